"""experiments/watch.py: the pictures exist and move, and the arrows in them are the learned graph's edges."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

for package in ("matplotlib", "pandas", "scipy", "yaml", "PIL"):
    pytest.importorskip(package, reason="needs experiments/requirements.txt")
from conftest import run  # noqa: E402
from matplotlib.colors import to_rgb  # noqa: E402
from matplotlib.patches import FancyArrowPatch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "experiments"))
import watch  # noqa: E402

PICTURES = ["adjacency.png", "episode.gif", "meeting_times.png", "strip.png"]
SHORT = ["--total-timesteps", 1000, "--eval-interval", 1000, "--eval-episodes", 1]


def train(script, folder, *options):
    """The run's folder of a short training."""
    folder.mkdir()
    run(script, *SHORT, *options, cwd=folder)
    return next((folder / "runs").iterdir())


@pytest.fixture(scope="module")
def dg_run(tmp_path_factory):
    # c = 1: models that have hardly been trained draw some edges only then
    return train("mappo_dg_lbf.py", tmp_path_factory.mktemp("watch") / "dg", "--c", 1)


@pytest.fixture
def episode():
    """Three agents in a row, three steps, 0 -> 1 and 2 -> 1 are learned in the second."""
    T, N = 3, 3
    graph, ratio = np.tile(np.eye(N, dtype=bool), (T, 1, 1)), np.ones((T, N, N))
    graph[1, 0, 1] = graph[1, 2, 1] = True
    ratio[1, 0, 1], ratio[1, 2, 1] = 0.0, 0.6
    oracle = np.tile(np.eye(N, dtype=bool), (T, 1, 1))
    oracle[1, 0, 1] = oracle[1, 1, 0] = oracle[1, 1, 2] = True
    positions = np.array([[[0, 0], [0, 3], [5, 5]]] * (T + 1))
    food = np.zeros((T + 1, 6, 6), dtype=int)
    food[:2, 2, 2] = 3
    rewards = np.array([[0, 0, 0], [0.5, 0, 0], [0, 0, 0]])
    actions = [["NONE"] * N, ["LOAD", "NORTH", "NONE"], ["EAST"] * N]
    return watch.Episode("title", [1, 2, 3], positions, food, actions, rewards, oracle, ratio, graph, 0.8)


def arrows(episode, t):
    """What draw_board draws at step t: (thick arrows, dotted ones) as {(start, end): look}, (column, row) each."""
    figure, ((ax,),) = watch.new_figure(1, 1, 4, 4)
    watch.draw_board(ax, episode, t, "light")
    found = [patch for patch in ax.patches if isinstance(patch, FancyArrowPatch)]
    ends = {True: {}, False: {}}
    for patch in found:
        start, end = ((int(x), int(y)) for x, y in patch._posA_posB)
        heads = patch.get_arrowstyle().arrow  # "-|>": at the end
        ends[patch.get_linewidth() > 2][start, end] = patch.get_alpha(), to_rgb(patch.get_edgecolor()), heads
    return ends[True], ends[False]


def test_edges_between_leaves_out_the_diagonal_and_keeps_the_direction(episode):
    edges = watch.edges_between(episode.graph, episode.ratio)
    assert edges == [[], [(0, 1, 0.0), (2, 1, 0.6)], []]
    assert watch.edges_between(episode.oracle)[1] == [(0, 1, 0.0), (1, 0, 0.0), (1, 2, 0.0)]


def test_arrows_go_from_influencer_to_influenced_and_fade_with_the_entropy_ratio(episode):
    learned, oracle = arrows(episode, 1)
    cells, hues = [(0, 0), (3, 0), (5, 5)], [to_rgb(hue) for hue in watch.colours("light", 3)]
    forward = "-|>"  # the head is at the influenced agent
    assert learned == {
        (cells[0], cells[1]): (1.0, hues[0], forward),
        (cells[2], cells[1]): (pytest.approx(0.4), hues[2], forward),
    }
    heads = {ends: look[-1] for ends, look in oracle.items()}  # 0 <-> 1 is one line with two heads
    assert heads == {(cells[0], cells[1]): "<|-|>", (cells[1], cells[2]): forward}
    assert arrows(episode, 0) == arrows(episode, 3) == ({}, {})


def test_the_adjacency_figure_has_a_row_for_each_ordered_pair(episode):
    episode.rewards[1, 2] = 0.25  # a second reward in the same step
    ax = watch.draw_adjacency(episode, "light").axes[0]
    rows = {round(y): label.get_text() for y, label in zip(ax.get_yticks(), ax.get_yticklabels())}
    dots = {(rows[round(y)], round(t)) for t, y in zip(*ax.lines[0].get_data())}
    assert dots == {("0 → 1", 1), ("2 → 1", 1)}
    (oracle,) = ax.collections
    lines = {(rows[int(segment[0, 1])], segment[:, 0].mean()) for segment in oracle.get_segments()}
    assert lines == {("0 → 1", 1), ("1 → 0", 1), ("1 → 2", 1)}
    ratios = dict(zip(rows.values(), ax.images[0].get_array()[:, 1]))
    assert (ratios["0 → 1"], ratios["2 → 1"], ratios["1 → 0"]) == (0, 0.6, 1)
    ax.figure.draw_without_rendering()
    numbers = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert set(numbers) == {"+0.50", "+0.25"} and not numbers["+0.50"].overlaps(numbers["+0.25"])


def test_the_meeting_times_have_influencers_as_rows(episode):
    for ax, graph in zip(watch.draw_meeting_times(episode, "light").axes, (episode.graph, episode.oracle)):
        assert (ax.get_ylabel(), ax.get_xlabel()) == ("influencer i", "influenced j")
        shown = {text.get_position()[::-1]: text.get_text() for text in ax.texts}  # (x, y) = (j, i)
        # all of this episode's edges are of step 1, so no pair meets earlier or by way of a third
        assert shown == {(i, j): "0" if i == j else "1" if graph[1, i, j] else "never" for i, j in shown}
        assert len(shown) == 9


def test_moments_are_the_steps_with_rewards_then_an_even_choice():
    rewards = np.zeros((10, 2))
    rewards[[4, 7], [0, 1]] = 0.5
    assert watch.moments(rewards, 4) == [0, 3, 4, 7]
    rewards[:] = 1
    assert watch.moments(rewards, 4) == [6, 7, 8, 9]
    assert watch.moments(np.zeros((2, 2)), 4) == [0, 1]


def test_an_episode_holds_what_the_models_say_about_what_was_played(dg_run):
    _, checkpoint = watch.load_checkpoint(dg_run)
    episode = watch.play(checkpoint, 2, 5)
    T, N = episode.rewards.shape
    assert (
        episode.food.shape == (T + 1, 8, 8) and episode.positions.shape == (T + 1, N, 2) and len(episode.actions) == T
    )
    for before, after, actions in zip(episode.positions, episode.positions[1:], episode.actions):
        for agent, action in enumerate(actions):
            dx, dy = watch.MOVES.get(action, (0, 0))
            moved = (after - before)[agent].tolist()
            assert moved in ([dy, dx], [0, 0])  # a collision or the border may be in the way
    script, args = watch.load_script("mappo_dg_lbf"), checkpoint["args"]
    oracle = script.oracle_graph(torch.from_numpy(episode.positions[1:]), args["oracle_distance"])
    assert (episode.oracle == oracle.numpy()).all()
    others = ~np.eye(N, dtype=bool)
    assert ((episode.ratio < 1) == episode.graph)[:, others].all()
    assert 0 < episode.graph[:, others].mean() < 1, "the test needs edges and gaps"
    transposed = watch.play(checkpoint | {"args": args | {"transpose_graph": True}}, 2, 5)
    assert (transposed.graph == episode.graph.swapaxes(1, 2)).all()


def test_pictures_of_a_run_and_its_tensorboard(dg_run, capsys):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    output = watch.main(watch.Args(dg_run, episodes=2, tensorboard=True))
    assert output == dg_run / "watch" and sorted(path.name for path in output.iterdir()) == PICTURES
    for name in PICTURES:
        with Image.open(output / name) as image:
            assert image.getcolors(10**6) is None or len(image.getcolors(10**6)) > 10, f"{name} is empty"
    steps = int(capsys.readouterr().out.split(": ")[1].split()[0])
    film = output / "episode.gif"
    with Image.open(film) as image:
        assert image.n_frames == steps + 1 > 1
    assert film.stat().st_size < 1_000_000
    events = event_accumulator.EventAccumulator(str(dg_run)).Reload()
    tags = [f"watch/{Path(name).stem}" for name in PICTURES]
    assert sorted(tag for tag in events.Tags()["images"] if tag.startswith("watch/")) == tags
    shown = events.Images("watch/episode")[0]
    assert shown.encoded_image_string == film.read_bytes() and shown.step >= 1000


@pytest.mark.parametrize(
    "script, options", [("baselines/ippo_local_lbf.py", []), ("ippo_dg_lbf.py", ["--graph", "oracle"])]
)
def test_runs_without_a_learned_graph_have_the_oracles_edges_only(tmp_path, script, options):
    folder = train(script, tmp_path / "run", *options)
    _, checkpoint = watch.load_checkpoint(folder / "checkpoint.pt")
    assert watch.play(checkpoint, 1, 0).graph is None
    output = watch.main(watch.Args(folder / "checkpoint.pt", episodes=1, output=tmp_path / "out", theme="dark"))
    assert sorted(path.name for path in output.iterdir()) == PICTURES


def test_mistakes_end_in_one_sentence_and_status_2(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    torch.save({"script": "another", "args": {}, "global_step": 0, "actor": {}}, tmp_path / "another.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    for target, word in (
        (tmp_path / "nothing", "exist"),
        (Path(""), "exist"),
        (tmp_path, "whole"),
        (tmp_path / "another.pt", "another.py"),
        (tmp_path / "list.pt", "whole"),
    ):
        with pytest.raises(watch.UserError, match=word):
            watch.main(watch.Args(target))
    command = [sys.executable, str(ROOT / "experiments" / "watch.py"), str(tmp_path / "nothing")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("watch.py: ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seed", -1], "--seed must lie in [0, 2^64), not -1"),
        (["--seed", 2**64], "--seed must lie in [0, 2^64)"),
        (["--episodes", 0], "--episodes must lie in [1, 1000], not 0"),
        (["--episodes", 10**9], "--episodes must lie in [1, 1000]"),
        (["--output", "a_file"], "File exists: 'a_file'"),
        (["--output", "a_file/in"], "Not a directory: 'a_file/in'"),
        (["--output", "x" * 300], "File name too long"),
        (["--output", "/proc/new"], "No such file or directory"),
    ],
)
def test_bad_options_end_in_one_sentence_and_status_2(dg_run, tmp_path, options, words):
    (tmp_path / "a_file").touch()
    done = run("experiments/watch.py", dg_run, "--episodes", 1, *options, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("watch.py: ") and words in done.stderr


@pytest.mark.parametrize(
    "change, words",
    [
        ({"c": None, "soft": None, "no_such_setting": 1}, "unexpected keyword argument"),
        ({"env_id": "Foraging-9x9-nothing"}, "unknown environment"),
        ({"env_id": "Foraging-15x15-3p-4f-v3"}, "Error(s) in loading state_dict"),
        ({"hidden_dim": 0}, "hidden_dim must lie in"),
        ({"gamma": "much"}, "TypeError"),
    ],
)
def test_a_checkpoint_of_another_version_is_one_sentence(dg_run, tmp_path, change, words):
    _, checkpoint = watch.load_checkpoint(dg_run)
    torch.save(checkpoint | {"args": checkpoint["args"] | change}, tmp_path / "checkpoint.pt")
    with pytest.raises(watch.UserError, match="does not fit mappo_dg_lbf.py as it is now") as error:
        watch.main(watch.Args(tmp_path))
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["script", "args", "actor", "models", "global_step"])
def test_a_part_of_the_checkpoint_that_is_nonsense_is_one_sentence(dg_run, tmp_path, name):
    _, checkpoint = watch.load_checkpoint(dg_run)
    torch.save(checkpoint | {name: ["nonsense"]}, tmp_path / "checkpoint.pt")
    with pytest.raises(watch.UserError):
        watch.main(watch.Args(tmp_path))


def test_a_flipped_bit_in_a_checkpoint_is_noticed(dg_run, tmp_path):
    content = bytearray((dg_run / "checkpoint.pt").read_bytes())
    with zipfile.ZipFile(dg_run / "checkpoint.pt") as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content[largest.header_offset + largest.file_size // 2 + 100] ^= 1  # a weight
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(watch.UserError, match="checkpoint.pt is damaged"):
        watch.main(watch.Args(tmp_path))


# TRAINED AGENT
def test_without_arguments_the_trained_agent_plays(tmp_path):
    done = run("experiments/watch.py", cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "watch").iterdir()) == PICTURES
    assert re.fullmatch(r"watch: \d+ steps, team return [\d.]+; pictures: episode.gif, .*\n", done.stdout)
    assert done.stderr == ""


def test_the_trained_agent_is_small_and_holds_what_plays_alone():
    assert watch.TRAINED.stat().st_size < 1_000_000
    _, checkpoint = watch.load_checkpoint(watch.TRAINED)
    assert checkpoint.keys() == {"script", "args", "global_step", "actor", "models"}
    assert checkpoint["args"]["winner_take_all"] and checkpoint["args"]["graph"] == "learned"


def test_the_trained_agent_plays_as_well_as_its_evaluations_say():
    script, args, actor, models = watch.restore(watch.load_checkpoint(watch.TRAINED)[1])
    returns = script.evaluate(actor, args, 0, "cpu").sum(-1)
    assert 0.6 < returns.mean() < 0.8  # its last four evaluations: 0.63 to 0.72
    envs = [script.make_env(args.env_id, args.winner_take_all, seed) for seed in range(10)]
    rollout = script.collect(envs, actor, "cpu")
    with torch.no_grad():
        predictor = models(rollout.obs, rollout.alive).action_predictor
    assert script.accuracy(predictor, rollout.actions[rollout.alive]) > 0.4  # of six actions


def test_an_exported_file_plays_like_its_run(dg_run, tmp_path):
    watch.main(watch.Args(dg_run, episodes=1, output=tmp_path / "run", export=tmp_path / "agent.pt"))
    _, checkpoint = watch.load_checkpoint(tmp_path / "agent.pt")
    exported = watch.play(checkpoint, 2, 5)
    episode = watch.play(watch.load_checkpoint(dg_run)[1], 2, 5)
    assert exported.actions == episode.actions and exported.title == episode.title
    assert np.allclose(exported.ratio, episode.ratio, atol=0.01)
    assert (tmp_path / "agent.pt").stat().st_size < 0.2 * (dg_run / "checkpoint.pt").stat().st_size


def test_a_run_without_a_learned_graph_is_exported_without_models(tmp_path):
    folder = train("baselines/mappo_local_lbf.py", tmp_path / "run")
    watch.main(watch.Args(folder, episodes=1, export=tmp_path / "agent.pt"))
    _, checkpoint = watch.load_checkpoint(tmp_path / "agent.pt")
    assert checkpoint.keys() == {"script", "args", "global_step", "actor"}
    assert watch.play(checkpoint, 1, 0).graph is None


@pytest.mark.parametrize("part", ["script", "args", "global_step", "actor", "models"])
def test_an_exported_file_that_lacks_a_part_is_one_sentence(part, tmp_path):
    checkpoint = torch.load(watch.TRAINED, weights_only=True)
    del checkpoint[part]
    torch.save(checkpoint, tmp_path / "agent.pt")
    with pytest.raises(watch.UserError, match="not a whole checkpoint|does not fit"):
        watch.main(watch.Args(tmp_path / "agent.pt"))


@pytest.mark.parametrize(
    "options, words",
    [
        (["--tensorboard"], "has no run folder with events"),
        (["--export", "no/such/folder.pt", "--output", "out"], "folder"),
        ([Path("no_such.pt")], "no_such.pt does not exist"),
    ],
)
def test_what_an_exported_file_cannot_do_is_one_sentence(options, words, tmp_path):
    done = run("experiments/watch.py", *options, "--episodes", 1, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("watch.py: ") and words in done.stderr
    assert not (tmp_path / "watch").exists()


def test_an_exported_file_is_not_resumed(tmp_path):
    done = run("mappo_dg_lbf.py", "--resume", watch.TRAINED, cwd=tmp_path, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "--resume" in done.stderr and not (tmp_path / "runs").exists()
