"""What all figures share: colours of light and dark pages, one style, parts of figures, files as PNG and SVG."""

import io
import math
import re

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

# Page, text, grid lines, then Okabe and Ito's colour-blind safe colours in an order that suits the page.
THEMES = {
    "light": "#ffffff #1f2328 #d8dee4 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split(),
    "dark": "#0d1117 #e6edf3 #30363d #56B4E9 #D55E00 #009E73 #CC79A7 #E69F00 #0072B2 #F0E442".split(),
}
# The paper's methods in its order, and those of ours that stand beside them in several grids -> place of their colour
PAPER_METHODS = [f"{name}_{rewards}" for name in ("mappo", "ippo") for rewards in ("dg", "global", "local")]
OUR_COLOURS = {"mappo_cdg": 4, "mappo_cdg_learned": 6}
METADATA = {"png": {"Software": None}, "svg": {"Date": None}}  # nothing that changes from one run to the next


def style(theme):
    """The matplotlib settings of all figures."""
    page, text, grid = THEMES[theme][:3]
    settings = dict.fromkeys(["figure.facecolor", "axes.facecolor"], page)
    settings |= dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], text)
    settings |= {"axes.grid": True, "grid.color": grid, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"font.size": 11, "axes.titlesize": 11, "legend.frameon": False, "svg.hashsalt": "report"}
    return settings | {"figure.constrained_layout.use": True}


def looks(methods, theme):
    """{method: line style}: the colour is the reward scheme, IPPO is dashed; other methods share the other colours."""
    colours, look = THEMES[theme][3:], {}
    for k, method in enumerate(PAPER_METHODS):
        if method in methods:
            look[method] = {"color": colours[k % 3], "ls": "--" if k >= 3 else "-"}
    free = colours[3:] if look else colours
    for method, k in OUR_COLOURS.items():
        if method in methods:
            look[method] = {"color": colours[k], "ls": "-"}
            free = [colour for colour in free if colour != colours[k]]
    for k, method in enumerate(method for method in methods if method not in look):
        look[method] = {"color": free[k % len(free)], "ls": ["-", "--", ":", "-."][k // len(free) % 4]}
    return look


def new_figure(rows, columns, width, height, **kwargs):
    """A figure of width x height inches and its (rows, columns) axes, without pyplot's global state."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def panels(titles, height):
    """A figure with a panel of the given height for each title, at most three in a row, and their axes."""
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure, axes = new_figure(rows, columns, max(6.5, 3.4 * columns), height * rows + 0.4, sharex=True, sharey=True)
    for ax in axes.flat[len(titles) :]:
        ax.set_visible(False)
    for ax in axes.flat[len(titles) - columns : len(titles)]:  # nothing but the page below them
        ax.tick_params(labelbottom=True)
    for ax, title in zip(axes.flat, titles, strict=False):
        ax.set_title(title)
    return figure, axes.flat[: len(titles)]


def legend_above(figure, lines):
    """One legend above all panels, as wide as the figure, which grows by its height; lines: {name: line style}."""
    handles = [Line2D([], [], lw=2.2, label=name, **line) for name, line in lines.items()]
    rows = math.ceil(len(lines) / max(1, int(figure.get_figwidth() * 11 / (max(map(len, lines)) + 7))))
    figure.set_figheight(figure.get_figheight() + 0.23 * rows)
    figure.legend(handles=handles, loc="outside upper center", ncols=math.ceil(len(lines) / rows))


def list_rows(ax, names):
    """Names the rows of a horizontal plot, the first at the top."""
    ax.set(yticks=range(len(names)), yticklabels=names, ylim=(len(names) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)


def draw_interval(ax, y, values, colour):
    """A point and its interval as a horizontal bar; values: (point, low, high)."""
    ax.plot(values[1:], [y, y], lw=8, alpha=0.45, solid_capstyle="butt", color=colour)
    ax.plot(values[0], y, "o", ms=6, color=colour)


def draw_bands(bands, **axes):
    """A figure of lines with bands; bands: {name: (x, (line, low, high), line style)}, axes: settings of the axes."""
    figure, ((ax,),) = new_figure(1, 1, 6.5, 3.8)
    for x, (line, low, high), look in bands.values():
        ax.fill_between(x, low, high, color=look["color"], alpha=0.15, lw=0)
        ax.plot(x, line, lw=2.2, **look)
    ax.set(**axes)
    ax.margins(x=0)
    legend_above(figure, {name: look for name, (_, _, look) in bands.items()})
    return figure


def figures_in(texts):
    """The names of the figures' files that pages show or link: a set."""
    return {name for text in texts for name in re.findall(r"experiments/figures/([\w.-]+\.(?:png|svg))\b", text)}


def save(draw, folder, name, shown=None):
    """Saves draw(theme), a figure, for every theme: folder/name-light.png and so on; creates the folder.

    shown: the names of the files that are wanted; None: all. Both formats are made if one is wanted: saving lays a
    figure out anew from where it is, so that a file's bytes would depend on what was saved before it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        files = {kind: f"{name}-{theme}.{kind}" for kind in METADATA}
        if shown is not None and shown.isdisjoint(files.values()):
            continue
        with mpl.rc_context(style(theme)):
            figure = draw(theme)
            for kind, file in files.items():
                content = io.BytesIO()
                figure.savefig(content, format=kind, dpi=150, metadata=METADATA[kind])
                if shown is None or file in shown:
                    (folder / file).write_bytes(content.getvalue())
