"""What all figures share: colours of light and dark pages, one style, files as PNG and SVG."""

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Page, text, grid lines, then Okabe and Ito's colour-blind safe colours in an order that suits the page.
THEMES = {
    "light": "#ffffff #1f2328 #d8dee4 #0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #000000".split(),
    "dark": "#0d1117 #e6edf3 #30363d #56B4E9 #D55E00 #009E73 #CC79A7 #E69F00 #0072B2 #F0E442".split(),
}


def style(theme):
    """The matplotlib settings of all figures."""
    page, text, grid = THEMES[theme][:3]
    settings = dict.fromkeys(["figure.facecolor", "axes.facecolor"], page)
    settings |= dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], text)
    settings |= {"axes.grid": True, "grid.color": grid, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"font.size": 11, "axes.titlesize": 11, "legend.frameon": False, "svg.hashsalt": "report"}
    return settings | {"figure.constrained_layout.use": True}


def new_figure(rows, columns, width, height, **kwargs):
    """A figure of width x height inches and its (rows, columns) axes, without pyplot's global state."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def save(draw, folder, name):
    """Saves draw(theme), a figure, for every theme: folder/name-light.png and so on; creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for theme in THEMES:
        with mpl.rc_context(style(theme)):
            figure = draw(theme)
            figure.savefig(folder / f"{name}-{theme}.png", dpi=150, metadata={"Software": None})
            figure.savefig(folder / f"{name}-{theme}.svg", metadata={"Date": None})
