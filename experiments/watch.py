"""Watch a trained run play Level-Based Foraging, with arrows for the edges of the dependence graph that it has learned.

    python experiments/watch.py runs/Foraging-8x8-2p-4f-coop-v3__mappo_dg_lbf__1__1769900000
    python experiments/watch.py RUN/checkpoint.pt --episodes 20 --seed 3 --output pictures --theme dark --tensorboard

Plays a few episodes with the saved policy and draws the one with the highest team return (of equals the shortest):
    episode.gif         every step: the state before it, what the agents do, the edges and the rewards of this step
    strip.png           the steps with rewards side by side
    adjacency.png       the entropy ratio of every pair over the episode, its learned edges and the oracle's
    meeting_times.png   m_0[i, j]: the step at which something that i did at the start can first have reached j
An edge i -> j means: what i does can influence j's next state. The oracle is the heuristic of mappo_dg_lbf.py, which
looks at distances after the step. Runs without a learned graph (baselines, --graph oracle, ...) get the oracle only.
"""

import importlib.util
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
import torch
import tyro
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, RegularPolygon
from PIL import Image
from report import THEMES, UserError, new_figure, style
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard.writer import FileWriter

ROOT = Path(__file__).resolve().parents[1]
MOVES = {"NORTH": (0, -1), "SOUTH": (0, 1), "WEST": (-1, 0), "EAST": (1, 0)}  # on the page, y downwards


@dataclass
class Args:
    run: tyro.conf.Positional[Path]
    """a run's folder or its checkpoint.pt"""
    episodes: int = 3
    """episodes to play; the best one is drawn"""
    seed: int = 0
    """seed of the boards and of the sampled actions"""
    output: Path | None = None
    """folder for the pictures (default: watch/ in the run's folder)"""
    theme: Literal["light", "dark"] = "light"
    """colours of the page"""
    tensorboard: bool = False
    """also add the pictures to the TensorBoard events of the run, which should be over"""


# PLAY
@dataclass
class Episode:
    """One episode of T steps; a pair is (i, j), i the influencer. ratio and graph are None if no graph is learned."""

    title: str
    levels: list  # (N)
    positions: np.ndarray  # (T+1, N, 2), row and column
    food: np.ndarray  # (T+1, rows, columns), level of the food in each cell
    actions: list  # (T, N), names
    rewards: np.ndarray  # (T, N)
    oracle: np.ndarray  # (T, N, N) bool
    ratio: np.ndarray | None  # (T, N, N), H(a^i | z^j, z'^j, z^i) / H(a^i | z^i)
    graph: np.ndarray | None  # (T, N, N) bool
    c: float


class Recorder:
    """Passes everything on to the environment, and keeps what is on the board before each step and after the last."""

    def __init__(self, env):
        self.env, self.food, self.positions = env, [], []

    def __getattr__(self, name):
        return getattr(self.env, name)

    def record(self, result):
        self.food.append(self.env.field.copy())
        self.positions.append([player.position for player in self.env.players])
        return result

    def reset(self):
        return self.record(self.env.reset())

    def step(self, actions):
        return self.record(self.env.step(actions))


def load_script(name):
    """The training script `name`.py of this repository as a module; nothing in it runs on import."""
    paths = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("baselines/*.py")]}
    if name not in paths:
        raise UserError(f"the checkpoint was written by {name}.py, which is not a script of this repository")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, paths[name])
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    if not hasattr(sys.modules[name], "LevelBasedForaging"):
        raise UserError(f"{name}.py does not play Level-Based Foraging, the only environment that can be drawn")
    return sys.modules[name]


def load_checkpoint(path):
    """The checkpoint of a run's folder or file; UserError if there is none, or not a whole one."""
    path = path / "checkpoint.pt" if path.is_dir() else path
    if not path.exists():
        raise UserError(f"{path} does not exist: give a run's folder or its checkpoint.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["script"], checkpoint["args"], checkpoint["actor"]
    except Exception as error:
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__})") from error
    return path, checkpoint


@torch.no_grad()
def entropy_ratios(script, models, obs, alive, c):
    """Entropy ratio and learned graph, both (B, N_i, N_j) as numpy arrays; obs (T+1, E, N, D), alive (T, E)."""
    _, predictor, reverse = models(obs, alive)
    graph, _ = script.learned_graph(predictor, reverse, c)
    entropy, reverse_entropy = (torch.distributions.Categorical(logits=x).entropy() for x in (predictor, reverse))
    return (reverse_entropy / entropy.unsqueeze(-1)).numpy(), graph.numpy()


def learned_edges(graph, ratio):
    """Edges of each step between two agents: T lists of (i, j, entropy ratio), i influences j; both (T, N, N)."""
    between = graph & ~np.eye(graph.shape[-1], dtype=bool)
    return [[(int(i), int(j), float(r[i, j])) for i, j in np.argwhere(g)] for g, r in zip(between, ratio)]


def play(checkpoint, episodes, seed):
    """Play with the saved policy -> the Episode with the highest team return, of equals the shortest."""
    script, args = load_script(checkpoint["script"]), checkpoint["args"]
    seeds = np.random.SeedSequence(seed).generate_state(episodes)
    envs = [Recorder(script.make_env(args["env_id"], args["winner_take_all"], s)) for s in seeds]
    N, D, A = envs[0].n_agents, envs[0].observation_space[0].shape[0], int(envs[0].action_space[0].n)
    actor = script.AgentNetwork(D, N, args["hidden_dim"], A)
    actor.load_state_dict(checkpoint["actor"])
    torch.manual_seed(seed)
    obs, actions, _, rewards, _, alive = script.collect(envs, actor, "cpu", args["eval_greedy"])
    best = max(range(episodes), key=lambda e: (round(rewards[:, e].sum().item(), 4), -alive[:, e].sum().item()))
    env, T = envs[best], int(alive[:, best].sum())
    positions, ratio, graph = np.array(env.positions), None, None
    oracle = load_script("mappo_dg_lbf").oracle_graph(torch.tensor(positions[1:]), args.get("oracle_distance", 3))
    if args.get("graph") == "learned":
        models = script.GraphModels(D, A, args["encoder"])
        models.load_state_dict(checkpoint["models"])
        ratio, graph = entropy_ratios(script, models, obs[: T + 1, [best]], alive[:T, [best]], args["c"])
        if args["transpose_graph"]:  # as the run uses it
            ratio, graph = ratio.swapaxes(1, 2), graph.swapaxes(1, 2)
    title = f"{checkpoint['script']} on {args['env_id']}, {checkpoint['global_step'] / 1e6:.3g}M frames"
    names = [[script.Action(action).name for action in step] for step in actions[:T, best].tolist()]
    rewards, levels = rewards[:T, best].numpy(), [int(player.level) for player in env.players]
    food = np.array(env.food)
    return Episode(title, levels, positions, food, names, rewards, oracle.numpy(), ratio, graph, args.get("c", 1.0))


# DRAW
def colours(theme, count):
    """A colour for each agent; green is the food's."""
    palette = [colour for colour in THEMES[theme][3:] if colour != "#009E73"]
    return [palette[i % len(palette)] for i in range(count)]


def opacity(ratio, c):
    """Opacity of an edge: 1 at ratio 0, faint at the threshold c."""
    return 0.2 + 0.8 * (1 - min(ratio / c, 1)) if c else 0.2


def draw_arrow(ax, start, end, **look):
    ax.add_patch(FancyArrowPatch(start, end, **{"shrinkA": 0, "shrinkB": 0, "mutation_scale": 13, "lw": 2.5} | look))


def draw_board(ax, episode, t, theme):
    """The state before step t with the edges, actions and rewards of the step; t = T: the final state alone."""
    page, text, grid = THEMES[theme][:3]
    rows, columns = episode.food.shape[1:]
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])
    for k in range(1, max(rows, columns)):
        ax.axvline(k - 0.5, color=grid, lw=0.7, zorder=0) if k < columns else None
        ax.axhline(k - 0.5, color=grid, lw=0.7, zorder=0) if k < rows else None
    ax.spines[:].set(visible=True, color=text)
    centred = {"ha": "center", "va": "center_baseline"}
    size = ax.get_window_extent().width / columns * 72 / ax.figure.dpi  # points per cell
    for row, column in np.argwhere(episode.food[t]):
        square = (column - 0.27, row - 0.27), 0.54, 0.54
        ax.add_patch(FancyBboxPatch(*square, boxstyle="round,pad=0,rounding_size=0.12", fc="#009E73", ec="none"))
        ax.text(
            column, row, episode.food[t, row, column], color="white", fontsize=0.36 * size, weight="bold", **centred
        )

    centres = [(column, row) for row, column in episode.positions[t]]
    over = t == len(episode.actions)
    radius = 0.37 * size  # shrink the arrows to the agents' rims, in points
    between = ~np.eye(len(centres), dtype=bool)
    for i, j in [] if over else np.argwhere(episode.oracle[t] & between):
        look = {"arrowstyle": "-|>", "ls": (0, (2, 1.5)), "color": text, "alpha": 0.65, "zorder": 2}
        draw_arrow(ax, centres[i], centres[j], lw=0.9, mutation_scale=7, shrinkA=radius, shrinkB=radius, **look)
    hues = colours(theme, len(centres))
    for i, j, ratio in [] if over or episode.graph is None else learned_edges(episode.graph, episode.ratio)[t]:
        look = {"connectionstyle": "arc3,rad=0.35", "color": hues[i], "alpha": opacity(ratio, episode.c), "zorder": 3}
        draw_arrow(ax, centres[i], centres[j], arrowstyle="-|>", shrinkA=radius, shrinkB=radius, **look)

    for i, (x, y) in enumerate(centres):
        action = "NONE" if over else episode.actions[t][i]
        if action in MOVES:
            dx, dy = MOVES[action]
            angle = np.arctan2(dy, dx) - np.pi / 2
            ax.add_patch(
                RegularPolygon((x + 0.42 * dx, y + 0.42 * dy), 3, radius=0.13, orientation=angle, color=hues[i])
            )
        if action == "LOAD":
            ax.add_patch(Circle((x, y), 0.42, fill=False, ec=hues[i], lw=2, zorder=4))
        ax.add_patch(Circle((x, y), 0.34, color=hues[i], zorder=5))
        ax.text(x, y - 0.06, i, color="white", fontsize=0.34 * size, weight="bold", zorder=6, **centred)
        ax.text(x, y + 0.21, f"lv {episode.levels[i]}", color="white", fontsize=0.16 * size, zorder=6, **centred)
        if not over and episode.rewards[t, i]:
            box = {"boxstyle": "round,pad=0.2", "fc": page, "ec": hues[i], "lw": 1.5}
            above = y - 0.62 if y > 0 else y + 0.62
            reward = f"{episode.rewards[t, i]:+.2f}"
            ax.text(x, above, reward, color=text, fontsize=0.27 * size, weight="bold", zorder=8, bbox=box, **centred)


def draw_panel(ax, episode, t, theme):
    """Beside the board: the step, every agent's action and return so far, and the legend."""
    ax.set(xlim=(0, 1), ylim=(1, 0))
    ax.axis("off")
    T, returns = len(episode.actions), episode.rewards[: t + 1].sum(0)
    hues, text = colours(theme, len(returns)), THEMES[theme][1]
    ax.text(0, 0.04, f"step {t} of {T}" if t < T else f"end, after {T} steps", fontsize=13, weight="bold")
    for y, cells in [(0.13, ("agent", "does", "return"))] + [
        (0.19 + 0.055 * i, (i, episode.actions[t][i].lower() if t < T else "-", f"{value:.2f}"))
        for i, value in enumerate(returns)
    ]:
        for x, cell, align in zip((0.06, 0.3, 0.95), cells, ("center", "left", "right")):
            colour = hues[cell] if isinstance(cell, int) else text
            ax.text(x, y, cell, ha=align, color=colour, weight="bold" if isinstance(cell, int) else "normal")
    bottom = 0.21 + 0.055 * len(returns)
    ax.text(0.3, bottom, "team", weight="bold")
    ax.text(0.95, bottom, f"{returns.sum():.2f}", ha="right", weight="bold")

    draw_arrow(ax, (0, 0.93), (0.17, 0.93), arrowstyle="-|>", ls=(0, (2, 1.5)), color=text, lw=0.9, mutation_scale=7)
    ax.text(0.22, 0.94, "oracle's edge", fontsize=9)
    ax.text(0, 0.985, "● load   ▸ move   ■ food (level)", fontsize=0)
    if episode.graph is None:
        ax.text(0, 0.87, "no learned graph", fontsize=9)
        return
    for k, share in enumerate((0.1, 0.5, 0.9)):
        y, ratio = 0.74 + 0.055 * k, share * episode.c
        draw_arrow(ax, (0, y), (0.17, y), arrowstyle="-|>", color=hues[0], alpha=opacity(ratio, episode.c))
        ax.text(0.22, y + 0.012, f"entropy ratio {ratio:.2f}", fontsize=9)
    ax.text(0, 0.67, "learned edge i → j\nin the colour of i", fontsize=9, va="center")


def draw_frame(episode, t, theme):
    """One picture of the film, 720 x 480 pixels."""
    figure, ((board, panel),) = new_figure(1, 2, 7.2, 4.8, width_ratios=[2.1, 1])
    figure.suptitle(episode.title, fontsize=10)
    figure.draw_without_rendering()  # settles the layout, from which the board takes its font sizes
    draw_board(board, episode, t, theme)
    draw_panel(panel, episode, t, theme)
    return figure


def moments(rewards, count):
    """Up to `count` steps worth seeing, in order: those with rewards first, then evenly spread ones; rewards (T, N)."""
    T = len(rewards)
    steps = np.flatnonzero(np.abs(rewards).sum(-1))[-count:].tolist()
    spread = [t for t in np.linspace(0, T - 1, count).astype(int).tolist() if t not in steps]
    return sorted(steps + list(dict.fromkeys(spread))[: count - len(steps)])


def draw_strip(episode, theme, count=4):
    """The main moments side by side."""
    steps = moments(episode.rewards, count)
    figure, axes = new_figure(1, len(steps), 3.2 * len(steps), 3.7)
    figure.suptitle(
        episode.title + ": arrows i → j, learned (strong: low entropy ratio) and oracle (dotted)", fontsize=11
    )
    figure.draw_without_rendering()
    for ax, t in zip(axes.flat, steps):
        draw_board(ax, episode, t, theme)
        ax.set_title(f"step {t}, team return {episode.rewards[: t + 1].sum():.2f}")
    return figure


def draw_adjacency(episode, theme):
    """Ordered pairs over time: entropy ratio (colour), learned edge (dot), oracle edge (line); rewards on top."""
    T, N = episode.rewards.shape
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    figure, ((ax,),) = new_figure(1, 1, 9, 1.6 + 0.32 * len(pairs))
    text = THEMES[theme][1]
    if episode.ratio is not None:
        ratio = np.stack([episode.ratio[:, i, j] for i, j in pairs])
        image = ax.imshow(ratio, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        bar = figure.colorbar(image, ax=ax, label="entropy ratio", extend="max", fraction=0.04)
        bar.ax.axhline(episode.c, color=THEMES[theme][4], lw=2)
    for row, (i, j) in enumerate(pairs):
        for t in np.flatnonzero(episode.oracle[:, i, j]):
            ax.plot([t - 0.5, t + 0.5], [row + 0.4, row + 0.4], color=THEMES[theme][4], lw=3, solid_capstyle="butt")
        if episode.graph is not None:
            t = np.flatnonzero(episode.graph[:, i, j])
            ax.plot(t, [row] * len(t), "o", ms=4, mfc="white", mec="black", mew=0.7)
    for t, i in np.argwhere(episode.rewards):
        ax.annotate(f"{i}: {episode.rewards[t, i]:+.2f}", (t, -0.6), (t, -0.75 - 0.0 * i), ha="center", fontsize=8)
    ax.set(yticks=range(len(pairs)), yticklabels=[f"{i} → {j}" for i, j in pairs], xlabel="step")
    ax.set(xlim=(-0.5, T - 0.5), ylim=(len(pairs) - 0.5, -0.5))
    ax.grid(False)
    dots = "dot: learned edge (ratio below c = {:g}); ".format(episode.c) if episode.graph is not None else ""
    ax.set_title(f"{episode.title}\n{dots}line: oracle's edge; numbers: an agent's reward\n", color=text)
    return figure


def draw_meeting_times(episode, theme):
    """m_0[i, j] on the learned graph and on the oracle's: rows influence, columns are influenced."""
    meeting_times = load_script("mappo_dg_lbf").meeting_times
    graphs = {"learned graph": episode.graph, "oracle's graph": episode.oracle}
    graphs = {name: graph for name, graph in graphs.items() if graph is not None}
    T, N = episode.rewards.shape
    figure, axes = new_figure(1, len(graphs), 3.2 * len(graphs), 3.4)
    for ax, (name, graph) in zip(axes.flat, graphs.items()):
        met = meeting_times(torch.from_numpy(graph).unsqueeze(1), torch.ones(T, 1))[0, 0].numpy()
        ax.imshow(np.minimum(met, T), cmap="cividis_r", vmin=0, vmax=T)
        for i, j in np.ndindex(N, N):
            word = "never" if np.isinf(met[i, j]) else f"{met[i, j]:.0f}"
            ax.text(j, i, word, ha="center", va="center", color="white" if min(met[i, j], T) > T / 2 else "black")
        ax.set(title=name, xticks=range(N), yticks=range(N), xlabel="influenced j", ylabel="influencer i")
        ax.grid(False)
    figure.suptitle(f"first meeting times from step 0 (of {T})", fontsize=11)
    return figure


# WRITE
def png(figure):
    """The figure as the bytes of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Software": None})
    return buffer.getvalue()


def gif(figures, milliseconds=350):
    """The figures as the bytes of a GIF with one palette; the last one stays for two seconds."""
    frames = [Image.open(io.BytesIO(png(figure))).convert("RGB") for figure in figures]
    sheet = Image.new("RGB", (frames[0].width, frames[0].height * len(frames[:: max(1, len(frames) // 8)])))
    for k, frame in enumerate(frames[:: max(1, len(frames) // 8)]):
        sheet.paste(frame, (0, k * frame.height))
    palette = sheet.quantize(128)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    frames[0].save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return buffer.getvalue()


def add_to_tensorboard(folder, pictures, global_step):
    """Add {file name: bytes} as images to the events in a run's folder; TensorBoard shows GIFs moving."""
    writer = FileWriter(str(folder), filename_suffix=".watch")
    for name, data in pictures.items():
        width, height = Image.open(io.BytesIO(data)).size
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
        writer.add_summary(Summary(value=[Summary.Value(tag=f"watch/{Path(name).stem}", image=image)]), global_step)
    writer.close()


def main(args):
    """Play, draw and write the four pictures -> their folder; raises UserError."""
    if args.episodes < 1:
        raise UserError(f"--episodes must be at least 1, not {args.episodes}")
    torch.set_num_threads(1)
    path, checkpoint = load_checkpoint(args.run)
    episode = play(checkpoint, args.episodes, args.seed)
    with mpl.rc_context(style(args.theme) | {"axes.grid": False, "savefig.dpi": 100}):
        pictures = {"episode.gif": gif([draw_frame(episode, t, args.theme) for t in range(len(episode.food))])}
        for draw in (draw_strip, draw_adjacency, draw_meeting_times):
            pictures[f"{draw.__name__.removeprefix('draw_')}.png"] = png(draw(episode, args.theme))
    output = args.output or path.parent / "watch"
    output.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (output / name).write_bytes(data)
    if args.tensorboard:
        add_to_tensorboard(path.parent, pictures, checkpoint["global_step"])
    print(f"{output}: {len(episode.actions)} steps, team return {episode.rewards.sum():.2f}")
    return output


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except UserError as error:
        print(f"watch.py: {error}", file=sys.stderr)
        sys.exit(2)
