"""What could lose a run: other runs' checkpoints, flipped bits, stop signals, full disks, odd clocks."""

import ast
import contextlib
import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import LBF_SCRIPTS, ROOT, load, run_folder, run_inside, scalars
from test_lbf_bad_input import assert_refused, last_words, snapshot
from test_lbf_resume import Death, assert_same_run, curves, same, state

SCRIPTS = ["mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"]
SMACLITE_SCRIPTS = [script.replace("lbf", "smaclite") for script in LBF_SCRIPTS if "mappo" in script]
# four iterations or more of 100 frames at most, a checkpoint and an evaluation after nearly each of them
TINY = ["--env-id", "Foraging-5x5-3p-2f-v3", "--no-winner-take-all", "--num-envs", 2, "--total-timesteps", 350]
TINY += ["--eval-episodes", 3, "--eval-interval", 90, "--checkpoint-interval", 50, "--hidden-dim", 16]
LONGER = ["--total-timesteps", 700]


def play(script, *options, cwd, status=0):
    """A tiny run in this process -> its folder."""
    cwd.mkdir(exist_ok=True)
    done = run_inside(script, *TINY, *options, cwd=cwd)
    assert done.returncode == status, done.stderr
    return run_folder(cwd)


def resume(script, path, *options, status=0):
    """--resume in this process, from an empty working directory -> CompletedProcess."""
    with tempfile.TemporaryDirectory() as cwd:
        done = run_inside(script, "--resume", path, *options, cwd=cwd)
        assert done.returncode == status, done.stderr
        assert not os.listdir(cwd)
    return done


def start(script, *options, cwd, prelude="", **settings):
    """The script as a process of its own, after the statements of the prelude."""
    driver = f"import runpy, sys\n{prelude}\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", driver, str(ROOT / script), *map(str, options)]
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | settings
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | settings.pop("env", {})
    return subprocess.Popen(command, cwd=cwd, env=environment, text=True, **settings)


@contextlib.contextmanager
def ended(process):
    """Whatever happens, the process does not outlive its test."""
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_for(condition, process, seconds=240):
    """Poll until condition() holds while the process lives."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Uninterrupted runs of 350 and of 700 frames, each played once: script, options -> folder."""
    played = {}

    def play_once(script, *options):
        if (script, options) not in played:
            played[script, options] = play(script, *options, cwd=tmp_path_factory.mktemp("reference"))
        return played[script, options]

    return play_once


@pytest.fixture
def finished(reference, tmp_path):
    """script -> a copy of the run of 350 frames."""
    return lambda script="mappo_dg_lbf.py": Path(shutil.copytree(reference(script), tmp_path / "run"))


# ONE RUN, ONE FOLDER
@pytest.mark.parametrize("script", SCRIPTS)
def test_an_older_copy_is_refused_where_its_run_is_further_on(script, finished):
    folder = finished(script)
    shutil.copy(folder / "checkpoint.pt", folder / "old.pt")
    old_step = state(folder)["global_step"]
    resume(script, folder, *LONGER)
    new_step = state(folder)["global_step"]
    before = snapshot(folder)
    for options in ([], LONGER, ["--total-timesteps", 2000]):
        done = resume(script, folder / "old.pt", *options, status=2)
        (line,) = done.stderr.splitlines()
        assert str(folder / "old.pt") in line and f"frame {old_step}" in line and f"frame {new_step}" in line
        assert done.stdout == "" and snapshot(folder) == before


def test_an_older_copy_goes_on_in_a_folder_of_its_own(finished, tmp_path):
    folder = finished()
    (other := tmp_path / "other").mkdir()
    shutil.copy(folder / "checkpoint.pt", other / "old.pt")
    resume("mappo_dg_lbf.py", folder, *LONGER)
    before = snapshot(folder)
    resume("mappo_dg_lbf.py", other / "old.pt", *LONGER)
    assert snapshot(folder) == before
    assert same(state(other), state(folder)) and {path.name.split(".")[0] for path in other.iterdir()} == {
        "checkpoint",
        "evaluations",
        "events",
        "old",
        "run",
    }


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", ["checkpoint.pt", "other.pt"])
def test_the_checkpoint_of_another_run_is_refused(script, name, finished, tmp_path):
    """Further on than the folder's own or not."""
    folder = finished(script)
    other = play(script, "--seed", 2, *LONGER, cwd=tmp_path / "other")
    shutil.copy(other / "checkpoint.pt", folder / name)
    before = snapshot(folder)
    done = resume(script, folder / name, "--total-timesteps", 2000, status=2)
    (line,) = done.stderr.splitlines()
    assert str(folder / name) in line and snapshot(folder) == before
    names = [json.loads((path / "run.json").read_text(encoding="utf-8"))["run_name"] for path in (folder, other)]
    assert all(run_name in line for run_name in names) and names[0] != names[1]


def test_a_second_process_at_the_same_run_is_refused(finished, tmp_path):
    """While the first lives, also if it has not begun to train; when it is gone, the run goes on."""
    folder, script = finished(), "mappo_dg_lbf.py"
    options = ["--resume", folder, "--total-timesteps", 20_000]  # half a minute
    written = (folder / "checkpoint.pt").stat().st_mtime_ns
    with ended(start(script, *options, cwd=tmp_path)) as first:
        wait_for(lambda: (folder / "checkpoint.pt").stat().st_mtime_ns != written, first)
        first.send_signal(signal.SIGSTOP)
        before = snapshot(folder)
        for link in (folder, folder / "checkpoint.pt"):
            done = resume(script, link, "--total-timesteps", 20_000, status=2)
            (line,) = done.stderr.splitlines()
            assert "another process" in line and str(folder) in line
        assert snapshot(folder) == before
        first.send_signal(signal.SIGTERM)
        first.send_signal(signal.SIGCONT)
        assert first.wait(timeout=60) == 143
    step = state(folder)["global_step"]
    resume(script, folder, "--total-timesteps", step + 100, status=2)  # less than the run has been promised
    (cwd := tmp_path / "cwd").mkdir()
    with ended(start(script, *options, cwd=cwd)) as second:
        wait_for(lambda: state(folder)["global_step"] > step, second)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_locked_run_is_refused(script, finished):
    """By a process that does nothing else."""
    folder = finished(script)
    lock = "import fcntl, sys\nfile = open(sys.argv[1], 'a+')\nfcntl.lockf(file, fcntl.LOCK_EX)\nprint(flush=True)\n"
    command = [sys.executable, "-c", lock + "input()", str(folder / "run.json")]
    before = snapshot(folder)
    with ended(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)) as other:
        assert other.stdout.readline() == "\n"
        (line,) = resume(script, folder, *LONGER, status=2).stderr.splitlines()
    assert "another process" in line and str(folder) in line and snapshot(folder) == before


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "checkpoint in a linked folder"])
def test_links_continue_their_own_run(kind, finished, tmp_path):
    folder, script = finished(), "mappo_dg_lbf.py"
    (elsewhere := tmp_path / "links").mkdir()
    if kind == "checkpoint":
        (link := elsewhere / "newest.pt").symlink_to(folder / "checkpoint.pt")
    else:
        (link := elsewhere / "newest").symlink_to(folder)
    path = link / "checkpoint.pt" if kind.endswith("linked folder") else link
    resume(script, path, *LONGER)
    assert state(folder)["global_step"] >= 700 and list(elsewhere.iterdir()) == [link] and link.is_symlink()
    assert (folder / "checkpoint.pt").is_file() and not (folder / "checkpoint.pt").is_symlink()


def test_a_copied_run_goes_on_by_itself(finished, tmp_path):
    folder, script = finished(), "mappo_dg_lbf.py"
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    before = snapshot(folder)
    resume(script, copied, *LONGER)
    assert snapshot(folder) == before and state(copied)["global_step"] >= 700
    resume(script, folder, *LONGER)
    assert_same_run(folder, copied)


@pytest.mark.parametrize("damage", ["half", "flipped bit", "empty"])
def test_a_damaged_checkpoint_does_not_keep_an_older_copy_from_being_resumed(damage, finished, reference):
    folder, script = finished(), "mappo_dg_lbf.py"
    shutil.copy(folder / "checkpoint.pt", folder / "old.pt")
    resume(script, folder, *LONGER)
    whole = (folder / "checkpoint.pt").read_bytes()
    half = len(whole) // 2
    flipped = whole[:half] + bytes([whole[half] ^ 1]) + whole[half + 1 :]
    (folder / "checkpoint.pt").write_bytes({"half": whole[:half], "flipped bit": flipped, "empty": b""}[damage])
    before = snapshot(folder)
    resume(script, folder, *LONGER, status=2)
    assert snapshot(folder) == before
    resume(script, folder / "old.pt", *LONGER)
    assert same(state(folder), torch_state(whole, folder)) and curves(folder).keys() == curves(reference(script)).keys()


def torch_state(data, folder):
    """The state() of a checkpoint that is no longer on disk."""
    (scratch := folder.parent / "scratch").mkdir()
    (scratch / "checkpoint.pt").write_bytes(data)
    return state(scratch)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"args": {}}', b"null", None])
def test_a_lost_run_json_is_written_anew(content, finished):
    folder = finished()
    run_name = json.loads((folder / "run.json").read_text(encoding="utf-8"))["run_name"]
    (folder / "run.json").write_bytes(content) if content is not None else (folder / "run.json").unlink()
    resume("mappo_dg_lbf.py", folder, *LONGER)
    again = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert again["run_name"] == run_name and again["args"]["total_timesteps"] == 700


# FILES
def members(data):
    """Positions of the bytes of each member of a zip archive."""
    for info in zipfile.ZipFile(io.BytesIO(data)).infolist():
        name_length, extra_length = (
            data[info.header_offset + k] + 256 * data[info.header_offset + k + 1] for k in (26, 28)
        )
        first = info.header_offset + 30 + name_length + extra_length
        yield range(first, first + info.file_size)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_flipped_bit_goes_unnoticed(script, reference, tmp_path):
    """In the data of every member, in their headers and in the archive's directory: refused, or loaded as it was."""
    module = load(script)
    whole = (reference(script) / "checkpoint.pt").read_bytes()
    expected = module.load_checkpoint(reference(script) / "checkpoint.pt")
    draw = random.Random(0)
    in_members = [position for member in members(whole) for position in {member[0], draw.choice(member), member[-1]}]
    around = [position for member in members(whole) for position in range(member[0] - 64, member[0])]
    directory = range(whole.rindex(b"PK\x01\x02") - 2000, len(whole))
    positions = [*in_members, *draw.sample(around, 20), *draw.sample(directory, 60)]
    assert len(in_members) > 100
    path, refused = tmp_path / "checkpoint.pt", set()
    for position in positions:
        data = bytearray(whole)
        data[position] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            loaded = module.load_checkpoint(str(path))
        except module.UserError as error:
            assert "is not a whole checkpoint" in str(error) and "\n" not in str(error)
            refused.add(position)
        else:
            assert same(loaded, expected), position
    assert refused >= set(in_members)


def test_a_flipped_bit_ends_in_one_sentence(finished):
    folder = finished()
    data = bytearray((folder / "checkpoint.pt").read_bytes())
    weights = state(folder)["critic"]["hidden.weight"].numpy().tobytes()
    data[data.index(weights) + 100] ^= 4
    (folder / "checkpoint.pt").write_bytes(data)
    before = snapshot(folder)
    done = resume("mappo_dg_lbf.py", folder, *LONGER, status=2)
    (line,) = done.stderr.splitlines()
    assert str(folder / "checkpoint.pt") in line and "not a whole checkpoint" in line and snapshot(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_lost_evaluations_csv_returns(script, finished, tmp_path, monkeypatch):
    """On a finished run and on one that was killed."""
    folder = finished(script)
    text = (folder / "evaluations.csv").read_bytes()
    assert len(text.splitlines()) >= 4
    (folder / "evaluations.csv").unlink()
    resume(script, folder)
    assert (folder / "evaluations.csv").read_bytes() == text

    killed = stopped_at(script, "collect", 7, lambda: (_ for _ in ()).throw(Death), tmp_path / "killed", monkeypatch)
    assert 0 < state(killed)["global_step"] < 350
    (killed / "evaluations.csv").unlink()
    resume(script, killed)
    assert (killed / "evaluations.csv").read_bytes() == text


def test_files_are_utf8_whatever_the_locale(tmp_path):
    """A locale that knows less than UTF-8: every file can be read as UTF-8, and the run goes on from them."""
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    with ended(start("mappo_dg_lbf.py", *TINY, cwd=tmp_path, env=locale)) as process:
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    folder = run_folder(tmp_path)
    for name in ("run.json", "evaluations.csv"):
        assert (folder / name).read_bytes().decode("utf-8").isascii()


@pytest.mark.parametrize("script", [*LBF_SCRIPTS, *SMACLITE_SCRIPTS])
def test_no_text_file_is_opened_in_the_encoding_of_the_locale(script):
    """Read off the syntax tree: each open() of text that is kept names its encoding."""
    tree = ast.parse((ROOT / script).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "open"]
    assert len(calls) >= 4
    for call in calls:
        binary = len(call.args) > 1 and "b" in ast.unparse(call.args[1])
        dropped = ast.unparse(call.args[0]) == "os.devnull"
        assert binary or dropped or any(keyword.arg == "encoding" for keyword in call.keywords), ast.unparse(call)


# STOP SIGNALS
def stopped_at(script, function, call, what, cwd, monkeypatch, *options, status=0):
    """A tiny run in whose call-th call of the script's function what() happens, halfway through -> its folder."""
    module, left = load(script), [call]
    env_class = module.LevelBasedForaging
    original, original_step = getattr(module, function), env_class.step
    inside = [False]

    def watched(*args, **kwargs):
        left[0] -= 1
        inside[0] = left[0] == 0
        return original(*args, **kwargs)

    def step(self, actions):
        if inside[0]:
            inside[0] = False
            what()
        return original_step(self, actions)

    cwd.mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        patch.setattr(module, function, watched)
        patch.setattr(env_class, "step", step)
        with contextlib.suppress(Death):
            done = run_inside(module, *TINY, *options, cwd=cwd)
            assert done.returncode == status, done.stderr
    assert left[0] <= 0
    return run_folder(cwd)


def kill_me(signum):
    return lambda: os.kill(os.getpid(), signum)


STOPS = list(zip(["evaluate", "collect", "evaluate", "collect"], [1, 1, 2, 4]))


@pytest.mark.parametrize(
    "script, signum",
    [(SCRIPTS[0], signal.SIGINT), (SCRIPTS[1], signal.SIGTERM), (SCRIPTS[0], signal.SIGHUP)],
)
def test_a_stop_in_an_evaluation_or_a_collection_is_answered_there(script, signum, reference, tmp_path, monkeypatch):
    """What is half done is dropped, the checkpoint is saved whatever its interval, the resumed run is the same."""
    for i, (function, call) in enumerate(STOPS):
        options = ["--checkpoint-interval", 0] if i % 2 else []
        cwd = tmp_path / str(i)
        folder = stopped_at(script, function, call, kill_me(signum), cwd, monkeypatch, *options, status=128 + signum)
        stopped = state(folder)
        whole = state(reference(script))
        assert stopped["evaluations"] == whole["evaluations"][: len(stopped["evaluations"])]
        if function == "evaluate":
            assert len(stopped["evaluations"]) == call - 1
        assert (stopped["global_step"] == 0) == (i < 2)
        assert stopped["global_step"] < whole["global_step"]
        resume(script, folder, "--checkpoint-interval", 50)
        assert_same_run(folder, reference(script))


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_that_is_stopped_again_and_again(script, reference, tmp_path, monkeypatch):
    """In the very same second, as far as the file names tell."""
    folder = stopped_at(script, "evaluate", 1, kill_me(signal.SIGTERM), tmp_path, monkeypatch, status=143)
    module = load(script)
    for function in ["evaluate", "collect", "evaluate"] * 2:
        left, original = [2], getattr(module, function)

        def stop(*args, left=left, original=original):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(module, function, stop)
            run_inside(module, "--resume", folder, cwd=tmp_path)
    resume(script, folder)
    assert_same_run(folder, reference(script))


@pytest.fixture
def stop_signals(lbf_script, monkeypatch):
    """A script and its StopSignals, which handles what the test says alone."""
    module = load(lbf_script)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    return module, module.StopSignals()


def test_a_signal_is_answered_under_raised_alone(stop_signals):
    """At once, where it comes there or has come before; outside it is kept for later."""
    module, stop_signals = stop_signals
    with stop_signals.raised():
        pass
    stop_signals.handle(signal.SIGTERM, None)
    assert stop_signals.received == signal.SIGTERM
    with pytest.raises(module.Stopped), stop_signals.raised():
        pytest.fail("the signal has come before")
    stop_signals.received = None
    reached = False
    with pytest.raises(module.Stopped), stop_signals.raised():
        reached = True
        stop_signals.handle(signal.SIGINT, None)
    assert reached and stop_signals.received == signal.SIGINT


def test_a_second_signal_ends_the_process_unless_it_comes_at_once(stop_signals, monkeypatch):
    """`timeout` and closing terminals send the first one twice."""
    module, stop_signals = stop_signals
    handlers, killed, clock = [], [], [100.0]
    monkeypatch.setattr(signal, "signal", lambda *args: handlers.append(args))
    monkeypatch.setattr(os, "kill", lambda *args: killed.append(args))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    stop_signals.handle(signal.SIGTERM, None)
    clock[0] += 0.5
    stop_signals.handle(signal.SIGTERM, None)
    assert killed == handlers == [] and stop_signals.received == signal.SIGTERM
    clock[0] += 0.6
    stop_signals.handle(signal.SIGINT, None)
    assert killed == [(os.getpid(), signal.SIGINT)] and handlers == [(signal.SIGINT, signal.SIG_DFL)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_collection_that_is_stopped_is_no_iteration(script, tmp_path, monkeypatch):
    module, left = load(script), [2]
    original = module.collect

    def collect(envs, *args):
        left[0] -= len(envs) == 2  # not in an evaluation, of three episodes
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(envs, *args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "collect", collect)
        assert run_inside(module, *TINY, cwd=tmp_path).returncode == 143
    assert state(run_folder(tmp_path))["iteration"] == 1


def test_a_stop_between_the_parts_is_answered_after_them(reference, tmp_path, monkeypatch):
    """During the update: it is finished, then the run is saved."""
    module, left = load("mappo_dg_lbf.py"), [2]
    original = module.ppo_update

    def ppo_update(*args):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(module, "ppo_update", ppo_update)
        assert run_inside(module, *TINY, cwd=tmp_path).returncode == 143
    folder = run_folder(tmp_path)
    assert state(folder)["iteration"] == 2
    resume("mappo_dg_lbf.py", folder)
    assert_same_run(folder, reference("mappo_dg_lbf.py"))


@pytest.mark.parametrize("where", ["evaluation", "collection"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_answers_a_stop_within_seconds(where, signum, tmp_path):
    """In an evaluation that would take minutes, or between thousands of episodes of a collection."""
    long = {"evaluation": ["--eval-episodes", 20_000], "collection": ["--num-envs", 5_000, "--total-timesteps", 10**7]}
    script = SCRIPTS[signum == signal.SIGTERM]
    options = [*TINY, "--env-id", "Foraging-10x10-4p-4f-coop-v3", *long[where]]
    ready = "events*" if where == "evaluation" else "evaluations.csv"
    with ended(start(script, *options, cwd=tmp_path)) as process:
        wait_for(lambda: list(tmp_path.glob(f"runs/*/{ready}")), process)
        time.sleep(0.5)
        assert process.poll() is None
        sent = time.monotonic()
        process.send_signal(signum)
        _, stderr = process.communicate(timeout=60)
        assert time.monotonic() - sent < 10, "a shared machine may be slow, but not that slow"
    assert process.returncode == 128 + signum and "Traceback" not in stderr, stderr
    checkpoint = state(run_folder(tmp_path))
    assert checkpoint["global_step"] == 0 and len(checkpoint["evaluations"]) == (where == "collection")
    assert not list(run_folder(tmp_path).glob("*.tmp"))


def test_a_second_signal_ends_a_run_at_once(finished, tmp_path):
    """While the first one's checkpoint is written to a disk that hangs: the last good one stays."""
    folder = finished()
    before = (folder / "checkpoint.pt").read_bytes()
    hang = "import os, time\nos.fsync = lambda file: (open('hangs', 'w').close(), time.sleep(600))"
    options = ["--resume", folder, "--total-timesteps", 10**8, "--checkpoint-interval", 0, "--eval-interval", 90]
    with ended(start("mappo_dg_lbf.py", *options, cwd=tmp_path, prelude=hang)) as process:
        wait_for((tmp_path / "hangs").exists, process)
        process.send_signal(signal.SIGTERM)
        time.sleep(1.5)  # within a second it would be the first one, sent twice
        assert process.poll() is None  # an evaluation is being written, which is finished first
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == -signal.SIGINT
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_hangup_that_nohup_ignores_stays_ignored(reference, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        folder = stopped_at("mappo_dg_lbf.py", "collect", 3, kill_me(signal.SIGHUP), tmp_path, monkeypatch)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert_same_run(folder, reference("mappo_dg_lbf.py"))


# ONE SENTENCE
@pytest.mark.parametrize(
    "error", [Exception("api_key not configured\n  (no-tty)"), OSError(errno.ENETUNREACH, "no\nnetwork"), ValueError()]
)
def test_tracking_that_cannot_begin(error, lbf_script, tmp_path, monkeypatch):
    def init(**settings):
        raise error

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert_refused(run_inside(lbf_script, *TINY, "--track", cwd=tmp_path), tmp_path, "--track")


def test_a_runs_that_is_a_file(lbf_script, tmp_path):
    (tmp_path / "runs").write_text("mine", encoding="utf-8")
    done = run_inside(lbf_script, *TINY, cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "runs" in line and (tmp_path / "runs").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_that_cannot_be_made(number, lbf_script, tmp_path, monkeypatch):
    def makedirs(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "makedirs", makedirs)
    assert_refused(run_inside(lbf_script, *TINY, cwd=tmp_path), tmp_path, "cannot write", os.strerror(number))


def fill_disk(monkeypatch, cwd, name, count):
    """From the count-th time on nothing of a file of this name reaches the disk."""
    original, left = os.fsync, [count]

    def fsync(file):
        if list(cwd.glob(f"runs/*/{name}.tmp")):
            left[0] -= 1
            if left[0] <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file)

    monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("name, count", [("checkpoint.pt", 1), ("checkpoint.pt", 3), ("evaluations.csv", 3)])
def test_a_full_disk(name, count, lbf_script, reference, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        fill_disk(patch, tmp_path, name, count)
        done = run_inside(lbf_script, *TINY, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    words = last_words(done, lbf_script)
    folder = run_folder(tmp_path)
    assert name in words and os.strerror(errno.ENOSPC) in words and not list(folder.glob("*.tmp"))
    if (name, count) == ("checkpoint.pt", 1):
        assert words.endswith("there is no checkpoint") and not (folder / "checkpoint.pt").exists()
        return
    assert words.endswith(f"the last checkpoint is of frame {state(folder)['global_step']}")
    text = (folder / "evaluations.csv").read_text(encoding="utf-8")
    whole = reference(lbf_script) / "evaluations.csv"
    assert whole.read_text(encoding="utf-8").startswith(text) and text.endswith("\n")
    resume(lbf_script, folder)  # there is room again
    assert_same_run(folder, reference(lbf_script))


def test_a_disk_that_is_full_for_tensorboard(tmp_path):
    """A real limit, on the size of a file: TensorBoard's thread cannot write what is logged."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))"
    options = [*TINY, "--total-timesteps", 10**6, "--checkpoint-interval", 0]
    with ended(start("mappo_dg_lbf.py", *options, cwd=tmp_path, prelude=limit)) as process:
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 2
    words = [line for line in stderr.replace("\r", "\n").splitlines() if line.startswith("mappo_dg_lbf.py: ")]
    assert len(words) == 1 and os.strerror(errno.EFBIG) in words[0] and words[0].endswith("there is no checkpoint")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_folder_that_is_deleted_under_way(script, tmp_path, monkeypatch):
    """The collection is finished; what follows cannot be written."""
    delete = lambda: shutil.rmtree(run_folder(tmp_path))  # noqa: E731
    module = load(script)
    with pytest.raises(module.UserError, match="cannot write .*No such file or directory; "):
        stopped_at(script, "collect", 5, delete, tmp_path, monkeypatch)
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("seed", [2**64, 2**64 + 1, 10**30])
def test_a_seed_that_is_too_large(seed, lbf_script, tmp_path):
    done = run_inside(lbf_script, *TINY, "--seed", seed, cwd=tmp_path)
    assert_refused(done, tmp_path, "seed must lie in", seed)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_largest_seed(script, tmp_path):
    assert f"__{2**64 - 1}__" in play(script, "--seed", 2**64 - 1, cwd=tmp_path).name


@pytest.mark.parametrize("options", [["--resume="], ["--resume", ""], ["--resume", "no such folder"]])
def test_a_resume_of_nothing_starts_no_run(options, lbf_script, tmp_path):
    assert_refused(run_inside(lbf_script, *TINY, *options, cwd=tmp_path), tmp_path, "--resume")


@pytest.mark.parametrize("closed", [[1], [2], [0, 1, 2]])
def test_closed_streams_do_not_end_a_run(closed, reference, tmp_path):
    def close():
        for number in closed:
            os.close(number)

    with ended(start("mappo_dg_lbf.py", *TINY, cwd=tmp_path, preexec_fn=close)) as process:
        assert process.wait(timeout=240) == 0
    assert_same_run(run_folder(tmp_path), reference("mappo_dg_lbf.py"))


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_reader_that_has_gone_away_does_not_end_a_run(stream, reference, tmp_path):
    with ended(start("mappo_dg_lbf.py", *TINY, cwd=tmp_path)) as process:
        getattr(process, stream).close()
        setattr(process, stream, None)
        other, _ = process.communicate(timeout=240) if stream == "stderr" else process.communicate(timeout=240)[::-1]
        assert process.returncode == 0, other
    assert "Traceback" not in other and "Exception ignored" not in other
    assert_same_run(run_folder(tmp_path), reference("mappo_dg_lbf.py"))


@pytest.mark.parametrize("error", [BrokenPipeError, ValueError])
def test_a_lasting_stream_drops_what_nobody_reads(error):
    """The first failure is the last attempt; what the stream knows besides is still asked of it."""
    module, tries = load("mappo_dg_lbf.py"), []

    def write(text):
        tries.append(text)
        raise error

    stream = module.LastingStream(SimpleNamespace(write=write, flush=lambda: None, encoding="ascii"))
    assert stream.encoding == "ascii"
    stream.write("a")
    stream.write("b")
    stream.flush()
    assert tries == ["a"]


@pytest.mark.parametrize("now", [1_700_000_000.0, 0.0])
def test_a_clock_that_stands_still(now, lbf_script, reference, tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: now)
    folder = play(lbf_script, cwd=tmp_path)
    assert all(0 < value < float("inf") for _, value in scalars(folder)["charts/SPS"])
    assert same(state(folder), state(reference(lbf_script)))


@pytest.mark.parametrize("script", ["mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"])
def test_an_import_error_of_a_users_edit_is_shown(script, tmp_path):
    """With its traceback, as any other error in the script."""
    text = (ROOT / script).read_text(encoding="utf-8")
    edited = text.replace("    # SET-UP\n", "    # SET-UP\n    from torch import no_such_thing\n", 1)
    assert edited != text
    (tmp_path / "edited.py").write_text(edited, encoding="utf-8")
    command = [sys.executable, "edited.py", *map(str, TINY)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "Traceback" in done.stderr and "no_such_thing" in done.stderr
    assert not (tmp_path / "runs").exists()


# TENSORBOARD
CLOCKS = {
    "one second": lambda session: 1_700_000_000.0,
    "a clock that goes back": lambda session: 1_700_000_000.0 - 3600 * session,
    "a clock that jumps": lambda session: 1_700_000_000.0 + [0, 50_000, -70_000, 3, -1_600_000_000][session],
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("clock", CLOCKS)
def test_curves_are_complete_whatever_the_clock_says(script, clock, reference, tmp_path, monkeypatch):
    """Five sessions, whose process ids sort the other way round: the order of names is that of writing."""
    module, inodes = load(script), []
    stops = [4, 3, 4, 3, None]
    for session, stop in enumerate(stops):
        left, original = [stop], module.collect

        def collect(*args, left=left, original=original):
            if left[0] is not None:
                left[0] -= 1
                if left[0] == 0:
                    raise Death
            return original(*args)

        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda session=session: CLOCKS[clock](session))
            patch.setattr(os, "getpid", lambda session=session: 99_999 - 10_000 * session)
            patch.setattr(module, "collect", collect)
            options = ["--resume", run_folder(tmp_path)] if session else TINY
            with contextlib.suppress(Death):
                assert run_inside(module, *options, cwd=tmp_path).returncode == 0
        files = sorted(run_folder(tmp_path).glob("events*"), key=lambda path: path.name)
        (new,) = {path.stat().st_ino for path in files} - set(inodes)
        inodes.append(new)
        assert [path.stat().st_ino for path in files] == inodes
    folder = run_folder(tmp_path)
    assert len(inodes) == 5 and curves(folder) == curves(reference(script))
    assert same(state(folder), state(reference(script)))


# THE NAME OF A RUN
@pytest.mark.parametrize("name", ["", "a/b", "/", "../x", "a/", "a\nb", "x" * 250, "\u2603" * 80])
def test_names_that_are_no_folder(name, lbf_script, tmp_path):
    done = run_inside(lbf_script, *TINY, f"--exp-name={name}", cwd=tmp_path)
    assert_refused(done, tmp_path, "exp_name")


@pytest.mark.parametrize("name", ["..", ".", "h\u00e9 \u2603", "a b", "-x", "a|b", "*", "a\\b", "\u2603" * 60])
def test_names_that_are(name, lbf_script, tmp_path):
    folder = play(lbf_script, f"--exp-name={name}", cwd=tmp_path)
    assert f"__{name}__1__" in folder.name and state(folder)["args"]["exp_name"] == name
    resume(lbf_script, folder, *LONGER)


def test_the_longest_name(tmp_path, monkeypatch):
    """255 bytes, the most that file systems take."""
    monkeypatch.setattr(time, "time", lambda: 1_700_000_000.0)
    room = 255 - len("Foraging-5x5-3p-2f-v3____1__1700000000")
    assert len(play("mappo_dg_lbf.py", "--exp-name", "x" * room, cwd=tmp_path / "fits").name) == 255
    (cwd := tmp_path / "too long").mkdir()
    done = run_inside("mappo_dg_lbf.py", *TINY, "--exp-name", "x" * (room + 1), cwd=cwd)
    assert_refused(done, cwd, "exp_name")
