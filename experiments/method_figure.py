"""Draws README's figure of the method: which rewards count for an action of agent 0, and from when.

python experiments/method_figure.py
"""

from pathlib import Path

from errors import one_sentence

with one_sentence():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import tyro

EDGES = {1: [(0, 1)], 3: [(1, 2)]}  # step -> (influencer, influenced)
STEPS, AGENTS = 6, 3
THEMES = {"light": ("#1a1a1a", "#ffffff", "#c8c8c8"), "dark": ("#f0f0f0", "#0d1117", "#4a4f57")}
REACHED, EDGE = "#0072B2", "#D55E00"  # Okabe-Ito


def first_reached(agent):
    """First step at which something that `agent` did at step 0 can have reached each agent, along EDGES."""
    reached = {agent: 0}
    for step in range(STEPS):
        for i, j in EDGES.get(step, []):
            if i in reached:
                reached.setdefault(j, step)
    return reached


def draw(path, ink, paper, faint):
    """One circle per agent and step; filled: the agent's TD error counts in full for agent 0's action at step 0."""
    figure, axes = plt.subplots(figsize=(8.5, 2.9), facecolor=paper)
    axes.set_facecolor(paper)
    met = first_reached(0)
    for agent in range(AGENTS):
        for step in range(STEPS):
            counts = step >= met.get(agent, STEPS)
            colour = REACHED if counts else faint
            axes.scatter(
                step, -agent, s=420, color=colour if counts else paper, edgecolors=colour, zorder=3, linewidths=2
            )
            axes.text(
                step,
                -agent,
                rf"$\delta^{agent}_{step}$",
                color="white" if counts else ink,
                ha="center",
                va="center",
                zorder=4,
            )
            if step:
                style = "-" if step - 1 >= met.get(agent, STEPS) else ":"
                axes.plot([step - 1, step], [-agent, -agent], style, color=colour, zorder=1)
    for step, edges in EDGES.items():
        for i, j in edges:
            style = {"arrowstyle": "-|>", "color": EDGE, "linewidth": 2, "shrinkA": 12, "shrinkB": 12}
            axes.annotate("", (step + 0.12, -j), (step - 0.12, -i), arrowprops=style, zorder=5)
            axes.text(step + 0.14, -(i + j) / 2, rf"$G_{step}[{i},{j}]=1$", color=EDGE, fontsize=9, va="center")
    for agent in range(AGENTS):
        label = rf"agent {agent}   $m_0[0,{agent}]={met[agent]}$"
        axes.text(-0.5, -agent, label, color=ink, ha="right", va="center")
    axes.text(2.5, -2.75, "time step", color=ink, ha="center")
    axes.set_xlim(-2.2, STEPS - 0.3)
    axes.set_ylim(-2.9, 0.5)
    axes.axis("off")
    for kind in ("png", "svg"):
        figure.savefig(
            f"{path}.{kind}",
            dpi=150,
            facecolor=paper,
            bbox_inches="tight",
            metadata={"Date": None} if kind == "svg" else None,
        )
    plt.close(figure)


def main():
    """Draws both themes into the folder figures/."""
    plt.rcParams["svg.hashsalt"] = "method"
    folder = Path(__file__).parent / "figures"
    folder.mkdir(exist_ok=True)
    for theme, colours in THEMES.items():
        draw(folder / f"method-{theme}", *colours)


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main, description=__doc__)
