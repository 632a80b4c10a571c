"""Table and figure of known_graph.py, from its CSV alone (report.py makes them, too)."""

import numpy as np
from matplotlib.lines import Line2D
from plotting import THEMES, new_figure

OBSERVATIONS = ["encoder", "raw", "own"]
COLUMNS = ["world", "policy", "agents", "observation", "seed", "iteration", "frames", "subset", "c", "true_density"]
COLUMNS += ["precision", "recall", "spurious_rate", "auc"]  # what table and figure need of the CSV


def last(data, **where):
    """The rows at the end of the runs that match, averaged over seeds for each observation, N, subset and c."""
    for name, value in where.items():
        data = data[data[name] == value]
    data = data[data["iteration"] == data.groupby("agents")["iteration"].transform("max")]
    return data.groupby(["observation", "agents", "subset", "c"], as_index=False).mean(numeric_only=True)


def table(data):
    """The table of docs/known-graph.md: precision, recall and AUC at c = 0.9 at the runs' end, means over seeds."""
    lines = [
        f"| world, policy | N | true edges | {' | '.join(OBSERVATIONS)} |",
        "| --- " * (3 + len(OBSERVATIONS)) + "|",
    ]
    data = data[(data["subset"] == "all") & (data["c"] == 0.9)]
    for world, policy in data[["world", "policy"]].drop_duplicates().itertuples(index=False):
        rows = last(data, world=world, policy=policy).set_index(["agents", "observation"])
        for N in rows.index.unique("agents"):
            density, cells = rows.loc[N, "true_density"].mean(), []
            for view in OBSERVATIONS:
                found = rows.loc[(N, view), ["precision", "recall", "auc"]] if (N, view) in rows.index else []
                cells.append(" / ".join("-" if np.isnan(x) else f"{x:.2f}" for x in found) or "not run")
            lines.append(f"| {world}, {policy} | {N} | {100 * density:.1f} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(data, theme):
    """Six panels; colour is what the models see, solid lines are precision, dashed ones recall, dotted ones chance."""
    text, hues = THEMES[theme][1], dict(zip(OBSERVATIONS, THEMES[theme][3:]))
    figure, axes = new_figure(2, 3, 10.2, 6.4)
    by_size, by_data, by_subset, *by_c = axes.flat
    everything = data[data["subset"] == "all"]
    action = everything[(everything["world"] == "action-driven") & (everything["policy"] == "random")]

    at_c = last(action, c=0.9)
    for view, rows in at_c.groupby("observation"):
        by_size.plot(rows["agents"], rows["precision"], "o-", color=hues[view], ms=4)
        by_size.plot(rows["agents"], rows["recall"], "s--", color=hues[view], ms=4)
    chance = at_c.groupby("agents")["true_density"].mean()
    by_size.plot(chance.index, chance, ":", color=text)
    sizes = chance.index.tolist()
    frames = at_c.groupby("agents")["frames"].mean() / 1000
    labels = [f"{N}\n{frames[N]:g}k" for N in sizes]
    by_size.set(xscale="log", xticks=sizes, xticklabels=labels, xlabel="agents N, frames of data", ylim=(-0.03, 1.03))
    by_size.minorticks_off()
    by_size.set_title("precision and recall at c = 0.9")

    for (view, N), rows in action[action["c"] == 0.9].groupby(["observation", "agents"]):
        curve, look = rows.groupby("frames")["auc"].mean(), {"fontsize": 8, "va": "center", "color": hues[view]}
        by_data.plot(curve.index, curve, color=hues[view], lw=1.2)
        by_data.annotate(N, (curve.index[-1], curve.iloc[-1]), (3, 0), textcoords="offset points", **look)
    by_data.axhline(0.5, ls=":", color=text)
    by_data.set(xscale="log", xlabel="frames of data", ylim=(0.4, 1.02))
    by_data.set_title("AUC by amount of data, for each N")

    subsets = ["seen", "enters", "leaves", "unseen"]
    for k, (view, rows) in enumerate(last(data, world="unseen", agents=5, c=0.5).groupby("observation")):
        rates, places = rows.set_index("subset").reindex(subsets), np.arange(len(subsets)) + 0.28 * (k - 1)
        by_subset.bar(places, rates["spurious_rate"], 0.26, color=hues[view], alpha=0.6)
        by_subset.plot(places, rates["recall"], "s", color=hues[view], ms=5)
    by_subset.set(xticks=range(4), xticklabels=subsets, xlabel="i in the view of j", ylim=(0, 1.03))
    by_subset.set_title("unseen, c = 0.5: recall (squares),\nnon-edges drawn (bars)")

    curves = {"random policy": ("action-driven", "random"), "trained policy": ("action-driven", "trained")}
    curves |= {"state-driven": ("state-driven", "random")}
    for ax, (title, (world, policy)) in zip(by_c, curves.items()):
        rows = last(everything, world=world, policy=policy)
        N = 5 if 5 in rows["agents"].to_numpy() else rows["agents"].max()
        for view, line in rows[rows["agents"] == N].groupby("observation"):
            ax.plot(line["c"], line["precision"], "-", color=hues[view])
            ax.plot(line["c"], line["recall"], "--", color=hues[view])
        ax.axhline(rows.loc[rows["agents"] == N, "true_density"].mean(), ls=":", color=text)
        ax.set(xlabel="threshold c", ylim=(-0.03, 1.03), title=f"{title}, N = {N}")
    handles = [Line2D([], [], color=hues[view], lw=2.2, label=view) for view in OBSERVATIONS]
    marks = {"precision": "-", "recall": "--", "chance": ":"}
    handles += [Line2D([], [], color=text, ls=dash, label=name) for name, dash in marks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=6)
    return figure
