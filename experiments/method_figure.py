"""Draws README's figure of the method: which rewards count for an action of agent 0, and from when.

python experiments/method_figure.py
"""

from pathlib import Path

from errors import one_sentence

with one_sentence():
    import tyro
    from plotting import THEMES, new_figure, save

EDGES = {1: [(0, 1)], 3: [(1, 2)]}  # step -> (influencer, influenced)
STEPS, AGENTS = 6, 3
REACHED, EDGE = THEMES["light"][3:5]


def first_reached(agent):
    """First step at which something that `agent` did at step 0 can have reached each agent, along EDGES."""
    reached = {agent: 0}
    for step in range(STEPS):
        for i, j in EDGES.get(step, []):
            if i in reached:
                reached.setdefault(j, step)
    return reached


def draw(theme):
    """One circle per agent and step; filled: the agent's TD error counts in full for agent 0's action at step 0."""
    paper, ink, faint = THEMES[theme][:3]
    figure, ((axes,),) = new_figure(1, 1, 7.2, 2.5)
    met = first_reached(0)
    for agent in range(AGENTS):
        for step in range(STEPS):
            counts = step >= met.get(agent, STEPS)
            colour = REACHED if counts else faint
            fill = colour if counts else paper
            axes.scatter(step, -agent, s=420, color=fill, edgecolors=colour, zorder=3, linewidths=2)
            text = {"color": "white" if counts else ink, "ha": "center", "va": "center", "zorder": 4}
            axes.text(step, -agent, rf"$\delta^{agent}_{step}$", **text)
            if step:
                style = "-" if step - 1 >= met.get(agent, STEPS) else ":"
                axes.plot([step - 1, step], [-agent, -agent], style, color=colour, zorder=1)
    for step, edges in EDGES.items():
        for i, j in edges:
            style = {"arrowstyle": "-|>", "color": EDGE, "linewidth": 2, "shrinkA": 12, "shrinkB": 12}
            axes.annotate("", (step + 0.12, -j), (step - 0.12, -i), arrowprops=style, zorder=5)
            axes.text(step + 0.14, -(i + j) / 2, rf"$G_{step}[{i},{j}]=1$", color=EDGE, fontsize=9, va="center")
    for agent in range(AGENTS):
        name = rf"agent {agent}   $m_0[0,{agent}]={met[agent]}$"
        axes.text(-0.5, -agent, name, color=ink, ha="right", va="center")
    axes.text(2.5, -2.75, "time step", color=ink, ha="center")
    axes.set_xlim(-2.2, STEPS - 0.3)
    axes.set_ylim(-2.9, 0.5)
    axes.axis("off")
    return figure


def main():
    """Draws both themes into the folder figures/."""
    save(draw, Path(__file__).parent / "figures", "method", {"method-light.svg", "method-dark.svg"})


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main, description=__doc__)
