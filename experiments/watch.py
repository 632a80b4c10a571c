"""Watch a trained run play Level-Based Foraging, with arrows for the edges of the dependence graph that it has learned.

    python experiments/watch.py                      # the trained agent that comes with the repository, into watch/
    python experiments/watch.py runs/RUN             # a run of your own, into runs/RUN/watch/
    python experiments/watch.py RUN/checkpoint.pt --episodes 20 --seed 3 --output pictures --theme dark --tensorboard
    python experiments/watch.py runs/RUN --export agent.pt      # and a small file to hand on, which plays like the run

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
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import UserError, one_sentence

with one_sentence():
    import matplotlib as mpl
    import numpy as np
    import torch
    import tyro
    from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, RegularPolygon
    from PIL import Image
    from plotting import THEMES, new_figure, style
    from tensorboard.compat.proto.summary_pb2 import Summary
    from torch.utils.tensorboard.writer import FileWriter

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ROOT / "experiments" / "trained" / "mappo_dg_8x8-2p-4f-coop.pt"
FOOD = "#009E73"
MOVES = {"NORTH": (0, -1), "SOUTH": (0, 1), "WEST": (-1, 0), "EAST": (1, 0)}  # on the page, y downwards


@dataclass
class Args:
    run: tyro.conf.Positional[Path] = TRAINED
    """a run's folder, its checkpoint.pt, or a file of --export"""
    episodes: int = 3
    """episodes to play, at most 1000; the best one is drawn"""
    seed: int = 0
    """seed of the boards and of the sampled actions, below 2^64"""
    output: Path | None = None
    """folder for the pictures (default: watch/ in the run's folder; for a file of --export: watch/ where you are)"""
    theme: Literal["light", "dark"] = "light"
    """colours of the page"""
    tensorboard: bool = False
    """also add the pictures to the TensorBoard events of the run, which should be over"""
    export: Path | None = None
    """also write what it takes to play (settings, policy, graph models in half precision) to this file"""


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
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():  # compares the checksums, at which torch.load does not look
                raise UserError(f"{path} is damaged: its checksums are wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return path, {name: checkpoint[name] for name in ("script", "args", "global_step", "actor")} | checkpoint
    except (UserError, OSError):
        raise
    except Exception as error:
        raise UserError(f"{path} is not a whole checkpoint ({type(error).__name__})") from error


def export(checkpoint, path):
    """Write the part of a checkpoint that plays."""
    kept = {name: checkpoint[name] for name in ("script", "args", "global_step", "actor")}
    if checkpoint["args"].get("graph") == "learned":
        # no action depends on these: half precision moves the entropy ratios in the third digit
        kept["models"] = {name: weight.half() for name, weight in checkpoint["models"].items()}
    with open(path, "wb") as file:
        torch.save(kept, file)


def is_exported(checkpoint):
    """Whether it is the file of an --export, which has no run folder and cannot be resumed."""
    return "run_name" not in checkpoint


@torch.no_grad()
def entropy_ratios(script, models, obs, alive, c):
    """Entropy ratio and learned graph, both (B, N_i, N_j) as numpy arrays; obs (T+1, E, N, D), alive (T, E)."""
    logits = models(obs, alive)
    graph, _ = script.learned_graph(logits.action_predictor, logits.reverse_model, c)
    entropy, reverse_entropy = script.entropy(logits.action_predictor), script.entropy(logits.reverse_model)
    return (reverse_entropy / entropy.unsqueeze(-1)).numpy(), graph.numpy()


def edges_between(graph, ratio=None):
    """The edges of each step between two agents: T lists of (i, j, entropy ratio), i influences j; both (T, N, N)."""
    ratio = np.zeros(graph.shape) if ratio is None else ratio
    graph = graph & ~np.eye(graph.shape[-1], dtype=bool)
    return [[(int(i), int(j), float(r[i, j])) for i, j in np.argwhere(g)] for g, r in zip(graph, ratio)]


def restore(checkpoint):
    """(script, args, actor, models) of a checkpoint, models None without a learned graph.

    Raises UserError if the script cannot be drawn, or is another version than the one that wrote the checkpoint.
    """
    script = load_script(str(checkpoint["script"]))
    try:
        checkpoint["global_step"] / 1e6  # a number, for the title
        args = script.Args(**checkpoint["args"])
        script.check_args(args)
        env = script.make_env(args.env_id, args.winner_take_all, 0)
        D, A = env.observation_space[0].shape[0], int(env.action_space[0].n)
        actor, models = script.AgentNetwork(D, env.n_agents, args.hidden_dim, A), None
        actor.load_state_dict(checkpoint["actor"])
        if getattr(args, "graph", None) == "learned":
            models = script.GraphModels(D, A, args.encoder, args.bf16)
            models.load_state_dict(checkpoint["models"])
    except (script.UserError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"the checkpoint does not fit {checkpoint['script']}.py as it is now ({reason})") from error
    return script, args, actor, models


def play(checkpoint, episodes, seed):
    """Play with the saved policy -> the Episode with the highest team return, of equals the shortest."""
    script, args, actor, models = restore(checkpoint)
    seeds = np.random.SeedSequence(seed).generate_state(episodes)
    envs = [Recorder(script.make_env(args.env_id, args.winner_take_all, s)) for s in seeds]
    torch.manual_seed(seed)
    rollout = script.collect(envs, actor, "cpu", args.eval_greedy)
    obs, actions, rewards, alive = rollout.obs, rollout.actions, rollout.rewards, rollout.alive
    best = max(range(episodes), key=lambda e: (round(rewards[:, e].sum().item(), 4), -alive[:, e].sum().item()))
    env, T = envs[best], int(alive[:, best].sum())
    positions, ratio, graph = np.array(env.positions), None, None
    distance = getattr(args, "oracle_distance", 3)
    oracle = load_script("mappo_dg_lbf").oracle_graph(torch.tensor(positions[1:]), distance)
    if models is not None:
        ratio, graph = entropy_ratios(script, models, obs[: T + 1, [best]], alive[:T, [best]], args.c)
        if args.transpose_graph:  # as the run uses it
            ratio, graph = ratio.swapaxes(1, 2), graph.swapaxes(1, 2)
    title = f"{checkpoint['script']} on {args.env_id}, {checkpoint['global_step'] / 1e6:.3g}M frames"
    names = [[script.Action(action).name for action in step] for step in actions[:T, best].tolist()]
    rewards, levels = rewards[:T, best].numpy(), [int(player.level) for player in env.players]
    food, c = np.array(env.food), getattr(args, "c", 1.0)
    return Episode(title, levels, positions, food, names, rewards, oracle.numpy(), ratio, graph, c)


# DRAW
def colours(theme, count):
    """A colour for each agent; green is the food's."""
    palette = [colour for colour in THEMES[theme][3:] if colour != FOOD]
    return [palette[i % len(palette)] for i in range(count)]


def opacity(ratio, c):
    """Opacity of an edge: 1 at entropy ratio 0, faint at the threshold c."""
    return 0.2 + 0.8 * (1 - min(ratio / c, 1)) if c else 0.2


def draw_arrow(ax, start, end, gap=0, bend=0, **look):
    """An arrow, `gap` points away from both its ends: thick if it has an opacity (alpha), else thin and dotted."""
    look |= {"shrinkA": gap, "shrinkB": gap, "connectionstyle": f"arc3,rad={bend}", "zorder": 3}
    thick, dotted = {"lw": 2.5, "mutation_scale": 13}, {"lw": 1, "mutation_scale": 7, "ls": (0, (2, 1.5))}
    ax.add_patch(FancyArrowPatch(start, end, **{"arrowstyle": "-|>"} | look | (thick if "alpha" in look else dotted)))


def draw_board(ax, episode, t, theme):
    """The state before step t with the edges, actions and rewards of the step; t = T: the final state alone."""
    page, text, grid = THEMES[theme][:3]
    hues, over = colours(theme, len(episode.levels)), t == len(episode.actions)
    rows, columns = episode.food.shape[1:]
    ax.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5), aspect="equal", xticks=[], yticks=[])
    ax.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color=grid, lw=0.7, zorder=0)
    ax.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color=grid, lw=0.7, zorder=0)
    ax.spines[:].set(visible=True, color=text)
    cell = ax.get_window_extent().width / columns * 72 / ax.figure.dpi  # points
    label = {"ha": "center", "va": "center_baseline", "weight": "bold", "zorder": 6}
    for row, column in np.argwhere(episode.food[t]):
        corner, shape = (column - 0.27, row - 0.27), "round,pad=0,rounding_size=0.12"
        ax.add_patch(FancyBboxPatch(corner, 0.54, 0.54, boxstyle=shape, fc=FOOD, ec="none"))
        ax.text(column, row, episode.food[t, row, column], color="white", fontsize=0.36 * cell, **label)

    centres = [(column, row) for row, column in episode.positions[t]]
    if not over:
        oracle, gap = edges_between(episode.oracle)[t], 0.37 * cell
        for i, j, _ in oracle:
            if i < j or (j, i, 0.0) not in oracle:  # both directions: one line with two heads
                both = {"arrowstyle": "<|-|>"} if (j, i, 0.0) in oracle else {}
                draw_arrow(ax, centres[i], centres[j], gap, color=text, **both)
        for i, j, ratio in edges_between(episode.graph, episode.ratio)[t] if episode.graph is not None else []:
            draw_arrow(ax, centres[i], centres[j], gap, 0.35, color=hues[i], alpha=opacity(ratio, episode.c))
    for i, (x, y) in enumerate(centres):
        action = "NONE" if over else episode.actions[t][i]
        if action in MOVES:
            (dx, dy), look = MOVES[action], {"radius": 0.13, "color": hues[i], "zorder": 4}
            angle = np.arctan2(dy, dx) - np.pi / 2
            ax.add_patch(RegularPolygon((x + 0.42 * dx, y + 0.42 * dy), 3, orientation=angle, **look))
        if action == "LOAD":
            ax.add_patch(Circle((x, y), 0.43, fill=False, ec=hues[i], lw=2, zorder=4))
        ax.add_patch(Circle((x, y), 0.36, color=hues[i], zorder=5))
        ax.text(x, y - 0.08, i, color="white", fontsize=0.34 * cell, **label)
        ax.text(x, y + 0.2, f"lv {episode.levels[i]}", color="white", fontsize=0.19 * cell, **label)
        if not over and episode.rewards[t, i]:
            box = {"boxstyle": "round,pad=0.2", "fc": page, "ec": hues[i], "lw": 1.5}
            above, reward = y - 0.62 if y > 0 else y + 0.62, f"{episode.rewards[t, i]:+.2f}"
            ax.text(x, above, reward, color=text, fontsize=0.26 * cell, bbox=box, **label | {"zorder": 8})


def draw_panel(ax, episode, t, theme):
    """Beside the board: the step, every agent's action and return so far, and the legend."""
    T, returns, text = len(episode.actions), episode.rewards[: t + 1].sum(0), THEMES[theme][1]
    hues = colours(theme, len(returns))
    ax.set(xlim=(0, 1), ylim=(1, 0))
    ax.axis("off")
    ax.text(0, 0.04, f"step {t} of {T}" if t < T else f"end, after {T} steps", fontsize=13, weight="bold")
    actions = [name.lower() for name in episode.actions[t]] if t < T else ["-"] * len(returns)
    names = [f"{i}, level {level}" for i, level in enumerate(episode.levels)]
    table = [("agent", "does", "return", text), *zip(names, actions, returns, hues)]
    for row, (agent, action, value, colour) in enumerate([*table, ("team", "", returns.sum(), text)]):
        y = 0.13 + 0.055 * row
        ax.text(0, y, agent, color=colour, weight="normal" if row == 0 else "bold")
        ax.text(0.46, y, action)
        ax.text(0.97, y, value if row == 0 else f"{value:.2f}", ha="right")
    if episode.graph is None:
        ax.text(0, 0.83, "no learned graph", fontsize=9)
    else:
        ax.text(0, 0.68, "learned edge i → j,\nin the colour of i", fontsize=9)
        for y, ratio in zip((0.74, 0.79, 0.84), (0.1 * episode.c, 0.5 * episode.c, 0.9 * episode.c)):
            draw_arrow(ax, (0, y), (0.18, y), color=hues[0], alpha=opacity(ratio, episode.c))
            ax.text(0.22, y + 0.012, f"entropy ratio {ratio:.2f}", fontsize=9)
    draw_arrow(ax, (0, 0.9), (0.18, 0.9), color=text)
    ax.text(0.22, 0.912, "edge of the oracle", fontsize=9)
    ax.plot(0.09, 0.96, "s", ms=9, color=FOOD)
    ax.text(0.22, 0.972, "food, with its level", fontsize=9)


def film(episode, theme):
    """The episode's states one by one, as images of 720 x 480 pixels."""
    figure, ((board, panel),) = new_figure(1, 2, 7.2, 4.8)
    figure.set_layout_engine("none")
    figure.text(0.5, 0.965, episode.title, ha="center", fontsize=10)
    for t in range(len(episode.food)):
        board.clear()
        panel.clear()
        board.set_position((0.02, 0.02, 0.62, 0.93))
        panel.set_position((0.68, 0, 0.31, 0.95))
        draw_board(board, episode, t, theme)
        draw_panel(panel, episode, t, theme)
        figure.canvas.draw()
        yield Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")


def moments(rewards, count):
    """Up to `count` steps to show, in order: the last ones with rewards, then evenly spread ones; rewards (T, N)."""
    steps = np.flatnonzero(np.abs(rewards).sum(-1))[-count:].tolist()
    spread = dict.fromkeys(np.linspace(0, len(rewards) - 1, count).astype(int).tolist())
    return sorted(steps + [t for t in spread if t not in steps][: count - len(steps)])


def draw_strip(episode, theme):
    """The main moments side by side."""
    steps = moments(episode.rewards, 4)
    figure, axes = new_figure(1, len(steps), 3.2 * len(steps), 3.7)
    figure.suptitle(
        f"{episode.title}: edges i → j, learned (strong: low entropy ratio) and the oracle's (dotted)", fontsize=12
    )
    figure.draw_without_rendering()
    for ax, t in zip(axes.flat, steps):
        draw_board(ax, episode, t, theme)
        ax.set_title(f"step {t}, team return {episode.rewards[: t + 1].sum():.2f}")
    return figure


def draw_adjacency(episode, theme):
    """Every ordered pair over time: entropy ratio (colour), learned edge (dot), oracle's edge (line), rewards."""
    T, N = episode.rewards.shape
    pairs, hues = [(i, j) for i in range(N) for j in range(N) if i != j], colours(theme, N)
    figure, ((ax,),) = new_figure(1, 1, 9, 1.7 + 0.32 * len(pairs))
    if episode.graph is not None:
        ratio = np.stack([episode.ratio[:, i, j] for i, j in pairs])
        image = ax.imshow(ratio, aspect="auto", cmap="cividis", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(image, ax=ax, label="entropy ratio", extend="max", fraction=0.04)
        row, t = np.nonzero(np.stack([episode.graph[:, i, j] for i, j in pairs]))
        ax.plot(t, row, "o", ms=4, mfc="white", mec="black", mew=0.7)
    row, t = np.nonzero(np.stack([episode.oracle[:, i, j] for i, j in pairs]))
    ax.hlines(row + 0.42, t - 0.5, t + 0.5, color="#D55E00", lw=3)
    above = np.cumsum(episode.rewards != 0, axis=1)  # rewards of one step stand one above the other
    for t, i in np.argwhere(episode.rewards):
        number = {"text": f"{episode.rewards[t, i]:+.2f}", "color": hues[i], "weight": "bold", "fontsize": 9}
        ax.annotate(xy=(t, -0.5), xytext=(0, 12 * above[t, i] - 9), textcoords="offset points", ha="center", **number)
    ax.set(xlim=(-0.5, T - 0.5), ylim=(len(pairs) - 0.5, -0.5), xlabel="step")
    ax.set(yticks=range(len(pairs)), yticklabels=[f"{i} → {j}" for i, j in pairs])
    dots = f"dot: learned edge (ratio below c = {episode.c:g}); " if episode.graph is not None else ""
    ax.set_title(f"{episode.title}\n{dots}line: oracle's edge; number: reward", pad=6 + 12 * above.max())
    return figure


def draw_meeting_times(episode, theme):
    """m_0[i, j] on the learned graph and on the oracle's: rows influence, columns are influenced."""
    graphs = {"learned graph": episode.graph, "the oracle's graph": episode.oracle}
    graphs = {name: graph for name, graph in graphs.items() if graph is not None}
    T, N = episode.rewards.shape
    figure, axes = new_figure(1, len(graphs), 3.4 * len(graphs), 3.4)
    for ax, (name, graph) in zip(axes.flat, graphs.items()):
        alive = torch.ones((T, 1), dtype=torch.bool)
        times = load_script("mappo_dg_lbf").meeting_times(torch.from_numpy(graph).unsqueeze(1), alive)
        met = times[0, 0].numpy()
        ax.imshow(np.minimum(met, T), cmap="cividis_r", vmin=0, vmax=T)
        for (i, j), m in np.ndenumerate(met):
            ink = "white" if m > T / 2 else "black"
            ax.text(j, i, "never" if np.isinf(m) else f"{m:.0f}", ha="center", va="center", color=ink)
        ax.set(title=name, xticks=range(N), yticks=range(N), xlabel="influenced j", ylabel="influencer i")
    figure.suptitle(f"first meeting times from step 0 (of {T})", fontsize=11)
    return figure


# WRITE
def png(figure):
    """The figure as the bytes of a PNG file."""
    figure.savefig(buffer := io.BytesIO(), format="png", metadata={"Software": None})
    return buffer.getvalue()


def gif(frames):
    """The images as the bytes of a GIF with one palette; 0.35 s each, the last one 2 s."""
    sample = np.concatenate([np.asarray(frame) for frame in frames[:: max(1, len(frames) // 8)]])
    palette = Image.fromarray(sample).quantize(128, Image.Quantize.MAXCOVERAGE)  # keeps the page exact
    first, *others = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [350] * len(others) + [2000]
    first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=others, duration=durations, loop=0)
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
    if not 1 <= args.episodes <= 1000:  # which are played and held all at once
        raise UserError(f"--episodes must lie in [1, 1000], not {args.episodes}")
    if not 0 <= args.seed < 2**64:
        raise UserError(f"--seed must lie in [0, 2^64), not {args.seed}")
    torch.set_num_threads(1)
    path, checkpoint = load_checkpoint(args.run)
    if args.tensorboard and is_exported(checkpoint):
        raise UserError(f"--tensorboard: {path} has no run folder with events")
    episode = play(checkpoint, args.episodes, args.seed)
    with mpl.rc_context(style(args.theme) | {"axes.grid": False, "savefig.dpi": 100}):
        pictures = {"episode.gif": gif(list(film(episode, args.theme)))}
        for draw in (draw_strip, draw_adjacency, draw_meeting_times):
            pictures[f"{draw.__name__.removeprefix('draw_')}.png"] = png(draw(episode, args.theme))
    output = args.output or (Path("watch") if is_exported(checkpoint) else path.parent / "watch")
    output.mkdir(parents=True, exist_ok=True)
    for name, data in pictures.items():
        (output / name).write_bytes(data)
    if args.tensorboard:
        add_to_tensorboard(path.parent, pictures, checkpoint["global_step"])
    if args.export:
        export(checkpoint, args.export)
    names = ", ".join(pictures)
    print(f"{output}: {len(episode.actions)} steps, team return {episode.rewards.sum():.2f}; pictures: {names}")
    return output


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args, description=__doc__))
