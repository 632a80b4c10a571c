"""Speed and memory of the scripts, as Markdown tables.

    python experiments/benchmark.py                # the LBF scripts on one core: some seven minutes
    python experiments/benchmark.py --smaclite     # the SMAClite scripts instead, on two cores: some fifteen minutes
    python experiments/benchmark.py --quick        # a test of the benchmark, its numbers mean little

Seconds are CPU seconds of all threads of a process: on an idle core the same as the clock's. A machine's speed drifts,
so what is compared is measured in turns, A B A B, and the ratio is taken within each pair: median, smallest..largest.
What trains here is the scripts' own main(), some of whose functions are wrapped to see when they are called;
evaluations and checkpoints are not counted.
"stock" is the lbforaging or smaclite package as installed, stepped with random actions: no networks, no learning.
Training on SMAClite has its environments in other processes: there, and there alone, seconds are the clock's.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import timeit
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, median
from time import perf_counter, process_time
from types import SimpleNamespace
from unittest import mock

from errors import SMACLITE_PACKAGES, UserError, one_sentence

with one_sentence():
    import gymnasium as gym
    import numpy as np
    import torch
    import tyro

REPOSITORY = Path(__file__).resolve().parent.parent
DG, LOCAL = "mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"
CDG = "mappo_cdg_lbf.py"
TARGETS = {LOCAL: 1.1, DG: 0.55}  # frames per step of the stock environment in the same time
TASK, DEFAULT_TASK = "Foraging-15x15-3p-4f-v3", "Foraging-8x8-2p-4f-coop-v3"
TASKS = [TASK, "Foraging-15x15-4p-3f-v3", "Foraging-10x10-3p-3f-v3"]
TASKS += [DEFAULT_TASK, "Foraging-10x10-2p-3f-coop-v3", "Foraging-15x15-3p-4f-coop-v3"]
PHASES = {  # of an iteration; each begins with the first call of one of these functions
    "collect": ["collect"],
    "graph": ["player_positions", "dependence_graph"],
    "advantages": ["Critic.forward"],
    "policy update": ["Batch", "ppo_update"],
    "model update": ["update_graph_models"],
    "log": ["episode_charts"],
}
SMACLITE, SMACLITE_LOCAL = "mappo_dg_smaclite.py", "baselines/mappo_local_smaclite.py"
MAPS = ["MMM2", "3s5z_vs_3s6z", "27m_vs_30m"]
SMACLITE_TARGETS = {"numpy": 3, "C++": 4}  # by the library for collisions: our steps per step of the stock environment
# Linux counts in a process's peak what its parent held when it started it: start it from a process that holds nothing
LAUNCHER = """import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout, done.stderr, used.ru_maxrss]))"""


@dataclass
class Args:
    repeats: int = 15
    """pairs of measurements behind a ratio that has a target"""
    smaclite: bool = False
    """measure the SMAClite scripts instead (needs the package; with the C++ library, too, where it is installed)"""
    quick: bool = False
    """two repeats, short and small"""


# WHAT IS MEASURED
def load(script):
    """The script as a new module, so that what is wrapped in it is wrapped nowhere else."""
    path = REPOSITORY / script
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wrap(owner, name, before=lambda: None, after=lambda result: None):
    """Have the function owner.name, if there is one, call before() and after(result)."""
    function = getattr(owner, name, None)

    def call(*args, **kwargs):
        before()
        result = function(*args, **kwargs)
        after(result)
        return result

    if function:
        setattr(owner, name, call)


class Training:
    """Runs a script's main() in the working directory and takes the time of its phases.

    history   of each iteration a record: seconds of each phase, of waiting for vector environments, and frames
    pairs     of each turn what was measured before it, and its frames per second
    """

    def __init__(self, module, *options, before=lambda: None, turns=1, least=0.0, iterations=1, timer=process_time):
        """Train for some turns: call before(), then iterate at least so many seconds and so many times."""
        self.module, self.timer = module, timer
        self.history, self.pairs, self.evaluating = [], [], False
        self.schedule = self.take_turns(before, turns, least, iterations)
        next(self.schedule)
        self.new_record()
        for phase, names in PHASES.items():
            for owner, _, name in (name.rpartition(".") for name in names):
                wrap(getattr(module, owner) if owner else module, name, partial(self.begin, phase))
        wrap(module, "collect", after=lambda rollout: self.add("frames", int(rollout.alive.sum())))
        wrap(module, "make_vector_env", after=self.watch_environments)
        wrap(module, "evaluate", partial(self.evaluate, True), lambda _: self.evaluate(False))
        module.tqdm = partial(module.tqdm, file=open(os.devnull, "w", encoding="utf-8"))
        # Ctrl-C ends the benchmark, not the script alone
        module.StopSignals = lambda: SimpleNamespace(received=None, raised=contextlib.nullcontext)
        options = [f"--exp-name={perf_counter()}", "--total-timesteps=1000000000", *options]
        options += ["--eval-interval=1000000000", "--eval-episodes=1", "--checkpoint-interval=0"]
        with mock.patch.object(sys, "argv", [module.__file__, *options]), contextlib.redirect_stdout(None):
            module.main()

    def watch_environments(self, envs):
        for name in ("reset_async", "reset_wait", "step_async", "step_wait"):
            wrap(envs, name, partial(self.wait, -1), partial(self.wait, 1))

    def wait(self, sign, *_):
        self.add("environment", sign * self.timer())

    def evaluate(self, begins):
        self.evaluating = begins

    def add(self, name, amount):
        self.record[name] += amount

    def new_record(self):
        self.record = dict.fromkeys([*PHASES, "environment", "frames"], 0)
        self.phase, self.since = "collect", self.timer()

    def begin(self, phase):
        if self.evaluating:
            return  # the untrained policy: a part of the set-up
        order = list(PHASES)
        if phase != "collect" and order.index(phase) <= order.index(self.phase):
            return  # it has begun before: ppo_update, too, calls the critic
        now = self.timer()
        self.add(self.phase, now - self.since)
        self.phase, self.since = phase, now
        if phase == "collect":
            try:
                self.schedule.send(self.record)
            except StopIteration:
                raise self.module.Stopped from None  # main() returns
            self.new_record()

    def take_turns(self, before, turns, least, iterations):
        yield  # the set-up
        first = yield  # slower than the others
        unseen = [phase for phase in PHASES if not first[phase]]
        expected = [] if hasattr(self.module, "GraphModels") else ["graph", "model update"]
        assert unseen == expected, f"{self.module.__file__} calls no function with which {unseen} begin"
        for _ in range(turns):
            reference, turn = before(), []
            while len(turn) < iterations or total(turn, *PHASES) < least:
                turn.append((yield))
            self.history += turn
            self.pairs.append((reference, total(turn, "frames") / total(turn, *PHASES)))

    def milliseconds(self, average=median):
        """Of each phase, and their sum."""
        phases = [1000 * average(record[phase] for record in self.history) for phase in PHASES]
        return [*phases, sum(phases)]


def total(history, *names):
    """Sum of these entries of some records."""
    return sum(record[name] for record in history for name in names)


def lbf_task(env_id):
    """The options for a task: the vanilla ones are trained on without winner-take-all."""
    return [f"--env-id={env_id}"] + ["--no-winner-take-all"] * ("coop" not in env_id)


def play(env, actions):
    """Play on with these joint actions -> steps per CPU second."""
    start = process_time()
    for joint_action in actions:
        _, _, terminated, truncated, _ = env.step(joint_action)
        if terminated or truncated:
            env.reset()
    return len(actions) / (process_time() - start)


def players(task, make_env, steps):
    """The stock environment and ours, each as a function that plays on: the same boards, the same random actions."""
    return same_games([gym.make(task, disable_env_checker=True).unwrapped, make_env(task)], steps)


def same_games(envs, steps):
    """For each environment a function that plays on: the same boards, the same random actions."""
    actions = torch.randint(6, (steps, envs[0].n_agents), generator=torch.Generator().manual_seed(1)).tolist()
    for env in envs:
        env.seed(1)
        env.reset()
    return [partial(play, env, actions) for env in envs]


def smaclite_players(module, name, use_cpp_rvo2, steps, timer=process_time):
    """The stock SMACliteEnv and ours, each as a function that plays on: the same games, the same random actions.

    Both are asked for what a MAPPO script needs: the action mask and the state.
    """
    from smaclite.env import SMACliteEnv

    with contextlib.redirect_stdout(None):
        stock = SMACliteEnv(module.make_map(name), seed=0, use_cpp_rvo2=use_cpp_rvo2)
    rngs = [np.random.default_rng(1) for _ in range(2)]

    def play_stock():
        _, start, t = stock.reset(seed=1), timer(), 0
        for _ in range(steps):
            stock.get_state()
            mask = np.array(stock.get_avail_actions(), bool)
            t, over = t + 1, stock.step(random_actions(mask, rngs[0]))[2]
            if over or t == 150:
                _, t = stock.reset(), 0
        return steps / (timer() - start)

    def play_ours():
        (_, info), start = ours.reset(seed=1), timer()
        for _ in range(steps):
            _, _, terminated, truncated, info = ours.step(random_actions(info["avail_actions"], rngs[1]))
            if terminated or truncated:
                _, info = ours.reset()
        return steps / (timer() - start)

    ours = module.make_env(name, use_cpp_rvo2)
    return play_stock, play_ours


def random_actions(mask, rng):
    """Random available actions (N) of a mask (N, A); half of the time all attack who can."""
    scores = rng.random(mask.shape)
    scores[:, 6:] += rng.random() < 0.5
    return np.where(mask, scores, -1.0).argmax(1).tolist()


def calls(function, args):
    """Call the function for 0.2 CPU seconds or more -> calls per CPU second."""
    count, seconds = timeit.Timer(partial(function, *args), timer=process_time).autorange()
    return count / seconds


def double_loop(rewards, values, terminated, alive, graph, gamma, gae_lambda):
    """The paper's definition of the soft multi-agent GAE: path products from every start, O(T^2) of them."""
    next_values = values[1:].masked_fill(terminated.unsqueeze(-1), 0.0)
    deltas = (rewards + gamma * next_values - values[:-1]).masked_fill(~alive.unsqueeze(-1), 0.0).unsqueeze(-1)
    advantages, edges = torch.zeros_like(deltas), graph.float()  # (T, E, N, 1), (T, E, N_i, N_j)
    for start in range(len(edges)):
        paths = torch.eye(edges.shape[-1])
        for t in range(start, len(edges)):
            paths = (paths @ edges[t] > 0).float()
            weights = gae_lambda * paths + (1 - gae_lambda)
            advantages[start] += (gamma * gae_lambda) ** (t - start) * (weights @ deltas[t])
    return advantages.squeeze(-1)


def episodes(T, E, N):
    """Random arguments of multi_agent_gae: half of the episodes end early, half in a terminal state."""
    length = torch.where(torch.rand(E) < 0.5, T, torch.randint(1, T + 1, (E,)))
    step, graph = torch.arange(T).unsqueeze(-1), (torch.rand(T, E, N, N) < 0.2) | torch.eye(N, dtype=torch.bool)
    terminated = (step == length - 1) & (torch.rand(E) < 0.5)
    return torch.randn(T, E, N), torch.randn(T + 1, E, N), terminated, step < length, graph, 0.99, 0.95


def synthetic(T, N, least):
    """Print the phases of DG's iteration on random episodes: lbforaging has no task of so many agents."""
    if sys.platform == "linux":  # fail rather than drive the machine out of memory
        limit = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text(encoding="utf-8"))[1])
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    module, E, D, alive = load(DG), 10, 3 * (N + 4), torch.ones(T, 10, dtype=torch.bool)
    obs, actions = torch.randint(15, (T + 1, E, N, D)).float(), torch.randint(6, (T, E, N))
    logprobs, rewards = torch.full((T, E, N), 1 / 6).log(), torch.rand(T, E, N) / 100
    rollout = module.Rollout(obs, actions, logprobs, rewards, ~alive, alive)
    env = SimpleNamespace(n_agents=N, _max_episode_steps=T, observation_space=[torch.empty(D)])
    env.action_space = [SimpleNamespace(n=6)]
    env.players = [SimpleNamespace(history=cells) for cells in torch.randint(15, (N, T + 1, 2)).tolist()]
    env.get_state = lambda: None
    module.make_env = lambda *_: env
    module.collect = lambda *_: rollout
    print(json.dumps(Training(module, *lbf_task(DEFAULT_TASK), least=least, iterations=3).milliseconds()))


def run(*arguments):
    """Run python with these arguments in the working directory -> stdout, peak memory in MB."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, arguments)]
    output = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, check=True).stdout
    status, stdout, stderr, memory = json.loads(output)
    if status == 2:
        raise UserError(stderr)
    if status:
        raise RuntimeError(stderr or f"status {status}: out of memory?")
    return stdout, memory / (2**20 if sys.platform == "darwin" else 2**10)


# TABLES
def print_machine(cores):
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8") if sys.platform == "linux" else ""
    model = re.search(r"model name\s*:\s*(.*)", cpuinfo)
    used = f"{os.cpu_count()} cores, of which {cores} {'is' if cores == 'one' else 'are'} used"
    print(f"{model[1] if model else platform.processor()}, {used}; ", end="")
    print(f"{platform.system()}, Python {platform.python_version()}, torch {torch.__version__}")


def table(title, header, rows):
    lines = [header, ["---"] * len(header), *rows]
    print(f"\n### {title}\n\n" + "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines), flush=True)


def in_turns(reference, other, repeats):
    """Speeds in turns: reference, other, reference, ... -> pairs (reference, other)."""
    return [(reference(), other()) for _ in range(repeats)]


def reached(value, target, low_is_good=False):
    good = value <= target if low_is_good else value >= target
    return f"{'yes' if good else 'NO'} ({100 * (value / target - 1):+.0f} %)"


def comparison(name, pairs, target=None, text="{:,.0f}".format):
    """A row: both speeds and their ratio (medians), the ratio's range, the target and whether it is met."""
    speeds, ratios = [text(median(speeds)) for speeds in zip(*pairs)], [other / reference for reference, other in pairs]
    verdict = [f">= {target}", reached(median(ratios), target)] if target else ["", ""]
    return [name, *speeds, f"{median(ratios):.2f}", f"{min(ratios):.2f}..{max(ratios):.2f}", *verdict]


def main_smaclite(args):
    for name in SMACLITE_PACKAGES:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(name=name)
    torch.set_num_threads(1)
    repeats, steps, least = (2, 10, 0.1) if args.quick else (min(args.repeats, 5), 150, 20.0)
    maps, size = (MAPS[:1], ["--num-envs=2"]) if args.quick else (MAPS, [])
    print_machine("two")
    ratio = ["ratio", "smallest..largest", "target", "reached"]
    module = load(SMACLITE)

    for library in ["numpy", "C++"] if importlib.util.find_spec("rvo2") else ["numpy"]:
        rows = []
        for name in maps:
            pairs = in_turns(*smaclite_players(module, name, library == "C++", steps), repeats=repeats)
            rows.append(comparison(name, pairs, SMACLITE_TARGETS[library], text="{:,.1f}".format))
        table(f"SMAClite, environment steps/s, collisions by {library}", ["map", "stock", "ours", *ratio], rows)

    rows, phases = [], []
    stock, _ = smaclite_players(module, maps[0], False, steps, timer=perf_counter)
    turns = {"before": stock, "turns": repeats, "least": least, "timer": perf_counter}
    for script in (SMACLITE, SMACLITE_LOCAL):
        training = Training(load(script), f"--env-id={maps[0]}", "--num-workers=2", *size, **turns)
        outside = 1 - total(training.history, "environment") / total(training.history, *PHASES)
        row = comparison(script, training.pairs, 1.8, text="{:,.1f}".format)
        rows.append([*row, f"{100 * outside:.0f} %"])
        phases.append([script, *(f"{ms:.0f}" for ms in training.milliseconds(mean))])
    header = ["script", "stock steps/s", "frames/s", *ratio, "time outside the environment"]
    table(f"Training frames/s with two workers against one stock environment, {maps[0]}", header, rows)
    table(f"Phases of an iteration (10 episodes of {maps[0]}), ms", ["script", *PHASES, "sum"], phases)


def main(args):
    clock, cpu = perf_counter(), process_time()
    torch.set_num_threads(1)
    repeats, least, steps = (2, 0.05, 200) if args.quick else (args.repeats, 0.5, 4000)
    print_machine("one")
    ratio = ["ratio", "smallest..largest", "target", "reached"]
    dg = load(DG)

    rows = []
    for task in TASKS:
        pairs = in_turns(*players(task, dg.make_env, steps), repeats=repeats if task == TASK else min(repeats, 5))
        rows.append(comparison(task, pairs, 4 if task == TASK else None))
    table("Environment steps/s (without winner-take-all)", ["task", "stock", "ours", *ratio], rows)

    rows = []
    stock, _ = players(TASK, dg.make_env, steps)
    for script, target in TARGETS.items():
        training = Training(load(script), *lbf_task(TASK), before=stock, turns=repeats, least=least)
        rows.append(comparison(script, training.pairs, target))
    header = ["script", "stock steps/s", "frames/s", *ratio]
    table(f"Training frames/s against environment steps/s, {TASK}", header, rows)

    rows = []
    for T, E, N, target in ((50, 10, 3, 15), (150, 10, 10, 25)):
        data, functions = episodes(T, E, N), (double_loop, dg.multi_agent_gae)
        pairs = in_turns(*(partial(calls, function, data) for function in functions), repeats=repeats)
        row = comparison((T, E, N), pairs, target, text=lambda speed: f"{1000 / speed:.2f}")
        difference = (double_loop(*data) - dg.multi_agent_gae(*data)).abs().max().item()
        rows.append([*row, f"{difference:.0e}", reached(difference, 1e-4, low_is_good=True)])
    header = ["(T, E, N)", "double loop, ms", "multi_agent_gae, ms", *ratio, "largest difference", "<= 1e-4"]
    table("multi_agent_gae against its definition", header, rows)

    rows = []
    cdg = load(CDG)
    for task in TASKS:
        pairs = in_turns(*same_games([dg.make_env(task), cdg.make_env(task)], steps), repeats=min(repeats, 5))
        rows.append(comparison(task, pairs, 0.71))  # a graph for 40 % of a step
    table("Environment steps/s without and with the counterfactual graph", ["task", "without", "with", *ratio], rows)

    rows = []
    for T, E, N in ((50, 10, 3), (150, 10, 10)):
        rewards, _, *rest = episodes(T, E, N)
        pair_data = rewards, torch.randn(T + 1, E, N, N), *rest
        measured = (
            partial(calls, dg.multi_agent_gae, episodes(T, E, N)),
            partial(calls, cdg.pairwise_targets, pair_data),
        )
        pairs = in_turns(*measured, repeats=min(repeats, 5))
        rows.append(comparison((T, E, N), pairs, 0.33, text=lambda speed: f"{1000 / speed:.2f}"))
    header = ["(T, E, N)", "multi_agent_gae, ms", "pairwise_targets, ms", *ratio]
    table("pairwise_targets against multi_agent_gae", header, rows)

    rows = []
    for script, task in itertools.product((DG, LOCAL), (DEFAULT_TASK, TASK)):
        training = Training(load(script), *lbf_task(task), least=4 * least, iterations=3)
        rows.append([script, task, *(f"{ms:.1f}" for ms in training.milliseconds())])
    table("Phases of an iteration (10 episodes), ms", ["script", "task", *PHASES, "sum"], rows)
    print(f"\nUp to here the process had {100 * (process_time() - cpu) / (perf_counter() - clock):.0f} % of a core.")

    _, memory = run(REPOSITORY / DG, f"--total-timesteps={500 if args.quick else 20_000}")
    row = [DG, f"{memory:.0f} MB", "< 1000 MB", reached(memory, 1000, low_is_good=True)]
    table("Peak memory, default task", ["script", "peak", "target", "reached"], [row])

    rows, sizes = [], [(50, N) for N in (2, 4, 8, 16, 32, 64)] + [(T, 3) for T in (25, 50, 100, 200)]
    for T, N in [(50, 2), (25, 3)] if args.quick else sizes:
        try:
            output, memory = run("-c", f"import benchmark; benchmark.synthetic({T}, {N}, {2 * least})")
            rows.append([T, N, *(f"{ms:.1f}" for ms in json.loads(output)[1:]), f"{memory:.0f}"])
        except RuntimeError as error:
            if "memory" not in str(error):
                raise
            rows.append([T, N, *["-"] * 6, "more than is free"])
    header = ["T", "N", *list(PHASES)[1:], "sum", "peak memory, MB"]
    table(f"An iteration of {DG} by steps and agents, ms (10 synthetic episodes, nothing is collected)", header, rows)


if __name__ == "__main__":
    with one_sentence(), tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = tyro.cli(Args, description=__doc__)
        if options.repeats < 1:
            raise UserError(f"--repeats must be at least 1, not {options.repeats}")
        os.chdir(folder)
        (main_smaclite if options.smaclite else main)(options)
        os.chdir(REPOSITORY)
