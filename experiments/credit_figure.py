"""Draws the figure of docs/counterfactual.md: who is credited for bringing a meeting about.

python experiments/credit_figure.py

Agent 0 walks in a corridor of SIZE cells, each step towards agent 1 or away from it with probability 1/2 (at the far
end: in place of away, it stays). Beside agent 1 it stops. It influences agent 1 in the step that it makes from there.

    needed        both load: agent 1 earns 1 and the episode ends. Without agent 0 there is no reward.
    by itself     agent 1 earns 1 in step HORIZON, whatever agent 0 does; they merely stand in each other's way.

Critics are perfect: expectations of the process, solved for. Credit is what mappo_cdg_lbf.py's own functions give
agent 0 for agent 1's reward, per step of one trajectory.
"""

from pathlib import Path

from errors import one_sentence

with one_sentence():
    import numpy as np
    import torch
    import tyro
    from plotting import looks, new_figure, save
    from watch import load_script

    cdg = load_script("mappo_cdg_lbf")

SIZE, HORIZON = 6, 8
GAMMA, LAMBDA = 0.99, 0.95
PATH = [4, 3, 4, 3, 2, 1, 0]  # distances of agent 0 from the cell beside agent 1, before each step
WORLDS = {"needed": "agent 1 needs agent 0", "by itself": "agent 1 earns by itself"}
ADVANTAGES = ["published", "pairwise", "difference"]


def steps_to_meet():
    """P (SIZE, SIZE): how distances change in a step, 0 being the end."""
    moves = np.zeros((SIZE, SIZE))
    for distance in range(1, SIZE):
        moves[distance, distance - 1] += 0.5
        moves[distance, min(distance + 1, SIZE - 1)] += 0.5
    return moves


def trajectory(world):
    """rewards (T, N), W (T+1, N_i, N_j), edges (T, N, N), effects (T, N_i, N_j) of one episode."""
    moves = steps_to_meet()
    T = len(PATH) if world == "needed" else HORIZON
    distances = PATH + [0] * (T + 1 - len(PATH))
    rewards = torch.zeros((T, 2))
    rewards[-1, 1] = 1.0
    graph = torch.eye(2, dtype=torch.bool).repeat(T, 1, 1)
    effects = torch.zeros((T, 2, 2))
    values = torch.zeros((T + 1, 2, 2))
    if world == "needed":
        # V(0) = 1: both load; V(d) = gamma E[V(d')]
        value = np.linalg.solve(np.eye(SIZE) - GAMMA * moves, np.eye(SIZE)[0])
        for t, distance in enumerate(distances):
            values[t, :, 1] = float(value[distance])  # all that agent 1 will earn comes after the meeting
        graph[-1, 0, 1] = True
        effects[-1, 0, 1] = 1.0
    else:
        meets = np.eye(SIZE)[0]  # probability, by distance, that agent 0 stands beside agent 1 by the last step
        for t in reversed(range(T)):
            if t < T - 1:
                meets = moves @ meets
                meets[0] = 1.0
            earned = GAMMA ** (T - 1 - t)
            values[t, 1, 1] = earned
            values[t, 0, 1] = earned * float(meets[distances[t]])
            graph[t, 0, 1] = distances[t] == 0
    values[-1] = 0.0
    return rewards, values, graph, effects


def credits(world):
    """{advantage: (T) what agent 0 is credited with for agent 1's reward}."""
    rewards, values, graph, effects = (x.unsqueeze(1) for x in trajectory(world))
    alive = torch.ones((len(rewards), 1), dtype=torch.bool)
    terminated = torch.zeros_like(alive)
    terminated[-1] = True
    end = (terminated, alive)
    own_values = values.diagonal(dim1=-2, dim2=-1)
    targets = cdg.pairwise_targets(rewards, values, *end, graph, GAMMA, LAMBDA)
    # agent 0's value is that of its effects, which are all of agent 1's reward or none
    effect_values = values[..., :1, 1] * effects.any()
    return {
        "published": cdg.multi_agent_gae(rewards, own_values, *end, graph, GAMMA, LAMBDA)[:, 0, 0],
        "pairwise": (targets - values[:-1])[:, 0, 0, 1],
        "difference": cdg.gae(effects.sum(-1)[..., :1], effect_values, *end, GAMMA, LAMBDA)[:, 0, 0],
    }


def draw(theme):
    """A panel for each world: bars per step, one for each advantage."""
    figure, (axes,) = new_figure(1, 2, 9.6, 3.3, sharey=True)
    look = looks(ADVANTAGES, theme)
    for ax, (world, title) in zip(axes, WORLDS.items(), strict=True):
        for k, (advantage, credit) in enumerate(credits(world).items()):
            place = np.arange(len(credit)) + 0.27 * (k - 1)
            ax.bar(place, credit, width=0.25, color=look[advantage]["color"], label=advantage)
        steps = ["towards" if b < a else "away" for a, b in zip(PATH, PATH[1:], strict=False)]
        steps += ["load"] if world == "needed" else ["beside"] * (HORIZON - len(steps))
        ax.set_xticks(range(len(steps)), steps, rotation=40, ha="right")
        ax.axhline(0, lw=1, color="0.5")
        ax.set_axisbelow(True)
        ax.set_title(title)
    axes[0].set_ylabel("credit of agent 0's action")
    axes[0].legend()
    return figure


def main():
    """Draws both themes into the folder figures/."""
    save(draw, Path(__file__).parent / "figures", "credit", {"credit-light.svg", "credit-dark.svg"})


if __name__ == "__main__":
    with one_sentence():
        tyro.cli(main, description=__doc__)
