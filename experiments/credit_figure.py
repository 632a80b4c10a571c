"""Draws the figure of docs/counterfactual.md: who is credited for bringing a meeting about.

python experiments/credit_figure.py

Agent 0 walks in a corridor of SIZE cells, each step towards agent 1 or away from it with probability 1/2 (at the far
end: in place of away, it stays). Beside agent 1 it stops. It influences agent 1 in the step that it makes from there.

    needed        both load: agent 1 earns 1 and the episode ends. Without agent 0 there is no reward.
    by itself     agent 1 earns 1 in step HORIZON, whatever agent 0 does; they merely stand in each other's way.

Critics are perfect: expectations of the process, solved for. The blind one knows what agent 1 sees of itself, which
never changes, so it holds the mean of the value over the process (needed), or the value itself (by itself). Credit is
what mappo_cdg_lbf.py's own functions give agent 0 for agent 1's reward, per step of one trajectory.
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
ADVANTAGES = {"published": "published", "pairwise": "pairwise", "surprise": "surprise"}


def steps_to_meet():
    """P (SIZE, SIZE): how distances change in a step, 0 being the end."""
    moves = np.zeros((SIZE, SIZE))
    for distance in range(1, SIZE):
        moves[distance, distance - 1] += 0.5
        moves[distance, min(distance + 1, SIZE - 1)] += 0.5
    return moves


def trajectory(world):
    """rewards (T, N), W (T+1, N_i, N_j), promises of the blind critic (T+1, N), edges (T, N, N) of one episode."""
    moves = steps_to_meet()
    T = len(PATH) if world == "needed" else HORIZON
    distances = PATH + [0] * (T + 1 - len(PATH))
    rewards = torch.zeros((T, 2))
    rewards[-1, 1] = 1.0
    graph = torch.eye(2, dtype=torch.bool).repeat(T, 1, 1)
    values = torch.zeros((T + 1, 2, 2))
    promises = torch.zeros((T + 1, 2))
    if world == "needed":
        # V(0) = 1: both load; V(d) = gamma E[V(d')]
        value = np.linalg.solve(np.eye(SIZE) - GAMMA * moves, np.eye(SIZE)[0])
        visits = np.linalg.solve(np.eye(SIZE) - moves.T, np.full(SIZE, 1 / SIZE))
        promises[:, 1] = float(visits @ value / visits.sum())
        for t, distance in enumerate(distances):
            values[t, :, 1] = float(value[distance])  # all that agent 1 will earn comes after the meeting
        graph[-1, 0, 1] = True
    else:
        meets = np.eye(SIZE)[0]  # probability that agent 0 stands beside agent 1 by the last step
        for t in reversed(range(T)):
            left = T - 1 - t
            if left:
                meets = moves @ meets
                meets[0] = 1.0
            earned = GAMMA**left
            values[t, 1, 1] = promises[t, 1] = earned
            values[t, 0, 1] = earned * float(meets[distances[t]])
            graph[t, 0, 1] = distances[t] == 0
    values[-1] = promises[-1] = 0.0
    return rewards, values, promises, graph


def credits(world):
    """{advantage: (T) what agent 0 is credited with for agent 1's reward}."""
    rewards, values, promises, graph = (x.unsqueeze(1) for x in trajectory(world))
    T = len(rewards)
    alive = torch.ones((T, 1), dtype=torch.bool)
    terminated = torch.zeros((T, 1), dtype=torch.bool)
    terminated[-1] = True
    common = (terminated, alive, graph, GAMMA, LAMBDA)
    own_values = values.diagonal(dim1=-2, dim2=-1)
    surprise_values = surprise(values, promises, graph, common)
    return {
        "published": cdg.multi_agent_gae(rewards, own_values, *common)[:, 0, 0],
        "pairwise": (cdg.pairwise_targets(rewards, values, *common) - values[:-1])[:, 0, 0, 1],
        "surprise": surprise_values[:, 0],
    }


def surprise(values, promises, graph, common):
    """Credit (T, 1) of the surprise, whose W is the expectation of what comes after the meeting less the promise."""
    T = len(graph)
    rewards = torch.zeros((T, 1, 2))
    rewards[-1, 0, 1] = 1.0
    excess = values.clone()
    # a promise is kept on average, or it is the same at all times: W shrinks by the share that was promised
    at_meeting = values[:-1, 0, 1, 1][graph[:, 0, 0, 1]][0]
    promised = promises[:-1, 0, 1][graph[:, 0, 0, 1]][0]
    excess[:, :, 0, 1] = values[:, :, 0, 1] * (1 - promised / at_meeting)
    targets = cdg.pairwise_targets(rewards, excess, *common, promises[:-1])
    return (targets - excess[:-1])[:, :, 0, 1]


def draw(theme):
    """A panel for each world: bars per step, one for each advantage."""
    figure, (axes,) = new_figure(1, 2, 9.6, 3.3, sharey=True)
    look = looks(list(ADVANTAGES), theme)
    for ax, (world, title) in zip(axes, WORLDS.items(), strict=True):
        for k, (advantage, credit) in enumerate(credits(world).items()):
            place = np.arange(len(credit)) + 0.27 * (k - 1)
            ax.bar(place, credit, width=0.25, color=look[advantage]["color"], label=ADVANTAGES[advantage])
        steps = ["towards" if b < a else "away" for a, b in zip(PATH, PATH[1:], strict=False)]
        steps += ["load"] if world == "needed" else ["beside"] * (HORIZON - len(steps))
        ax.set_xticks(range(len(steps)), steps, rotation=40, ha="right")
        ax.axhline(0, lw=1, color=figure.get_facecolor() if theme is None else "0.5")
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
