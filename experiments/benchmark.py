"""Speed and memory of the scripts, as Markdown tables.

    python experiments/benchmark.py                # the LBF scripts on one core: some seven minutes
    python experiments/benchmark.py --end-to-end   # five minutes more: also the speed of whole runs of the scripts
    python experiments/benchmark.py --smaclite     # the SMAClite scripts instead, on two cores: some fifteen minutes
    python experiments/benchmark.py --quick        # a test of the benchmark, its numbers mean little

Seconds are CPU seconds of all threads of a process: on an idle core the same as the clock's. A machine's speed drifts,
so what is compared is measured in turns, A B A B, and the ratio is taken within each pair: median, smallest..largest.
What trains here is the scripts' own main loop, stopped at each section; evaluations and checkpoints are not counted.
"stock" is the lbforaging or smaclite package as installed, stepped with random actions: no networks, no learning.
Training on SMAClite has its environments in other processes: there, and there alone, seconds are the clock's.
"""

import contextlib
import importlib.util
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from types import ModuleType, SimpleNamespace

from errors import UserError, one_sentence

with one_sentence():
    import gymnasium as gym
    import numpy as np
    import torch
    import tyro

REPOSITORY = Path(__file__).resolve().parent.parent
DG, LOCAL = "mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"
TASK, DEFAULT_TASK = "Foraging-15x15-3p-4f-v3", "Foraging-8x8-2p-4f-coop-v3"
TASKS = [TASK, "Foraging-15x15-4p-3f-v3", "Foraging-10x10-3p-3f-v3"]
TASKS += [DEFAULT_TASK, "Foraging-10x10-2p-3f-coop-v3", "Foraging-15x15-3p-4f-coop-v3"]
# the phases of an iteration, and how the line of a script's main loop begins with which each of them begins
PHASES = {"collect": "# COLLECT", "graph": "# DEPENDENCE GRAPH", "advantages": "# ADVANTAGES"}
PHASES |= {"policy update": "# UPDATE POLICY AND CRITIC", "model update": "losses |= update_graph_models("}
PHASES |= {"log": "# LOG"}
SMACLITE, SMACLITE_LOCAL = "mappo_dg_smaclite.py", "baselines/mappo_local_smaclite.py"
MAPS = ["MMM2", "3s5z_vs_3s6z", "27m_vs_30m"]
NO_EVALUATION = ["--eval-interval=1000000000", "--eval-episodes=1", "--checkpoint-interval=0"]
# Linux counts in a process's peak what its parent held when it started it: start it from a process that holds nothing
LAUNCHER = """import json, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stdout, done.stderr, used.ru_utime + used.ru_stime, used.ru_maxrss]))"""


@dataclass
class Args:
    repeats: int = 15
    """pairs of measurements behind a ratio that has a target"""
    end_to_end: bool = False
    """also run the scripts as they are, as subprocesses, to confirm the training speeds"""
    smaclite: bool = False
    """measure the SMAClite scripts instead (needs the package; with the C++ library, too, where it is installed)"""
    quick: bool = False
    """two repeats, short and small"""


# WHAT IS MEASURED
def load(script):
    """The script as a module whose main() is a generator: it yields (phase, global_step) where each phase begins."""
    path, lines, found = REPOSITORY / script, [], set()
    for line in path.read_text(encoding="utf-8").splitlines():
        for phase, start in PHASES.items():
            indent, found_here, _ = line.partition(start)
            if found_here and len(indent) >= 8 and not indent.strip():  # not the title of a section of the file
                lines.append(f"{indent}yield {phase!r}, global_step")
                found.add(phase)
        lines.append(line)
    missing = PHASES.keys() - found - ({"graph", "model update"} if "local" in script else set())
    assert not missing, f"{script}: the phases {missing} begin with other lines than PHASES says"
    module = sys.modules[path.stem] = ModuleType(path.stem)
    module.__file__ = str(path)
    exec(compile("\n".join(lines), path, "exec"), module.__dict__)
    module.tqdm = partial(module.tqdm, file=open(os.devnull, "w", encoding="utf-8"))
    module.signal = SimpleNamespace(**vars(signal) | {"signal": lambda *_: None})  # Ctrl-C ends the benchmark
    return module


class Training:
    """A script's main(), iteration by iteration; its run folder is made in the working directory."""

    def __init__(self, module, *task, timer=process_time):
        task = [f"--exp-name={perf_counter()}", *task, "--total-timesteps=1000000000", *NO_EVALUATION]
        arguments, sys.argv = sys.argv, [module.__file__, *task]
        self.loop, self.timer = module.main(), timer
        with contextlib.redirect_stdout(None):
            _, self.global_step = next(self.loop)
        sys.argv = arguments
        self.iteration()  # the first is slower

    def iteration(self):
        """Train for an iteration -> seconds of each phase."""
        seconds, phase, start = dict.fromkeys(PHASES, 0.0), "collect", self.timer()
        while True:
            following, self.global_step = next(self.loop)
            end = self.timer()
            seconds[phase] += end - start
            phase, start = following, end
            if phase == "collect":
                return seconds

    def speed(self, least, history=None):
        """Train for at least so many seconds -> frames per second; the list `history` gets each iteration's seconds."""
        before, iterations = self.global_step, []
        while sum(sum(seconds.values()) for seconds in iterations) < least:
            iterations.append(self.iteration())
        if history is not None:
            history += iterations
        return (self.global_step - before) / sum(sum(seconds.values()) for seconds in iterations)

    def phases(self, least):
        """Train for three iterations or more, and at least so many seconds -> median ms of each phase."""
        history = [self.iteration() for _ in range(3)]
        while sum(sum(seconds.values()) for seconds in history) < least:
            history.append(self.iteration())
        return [1000 * median(seconds[phase] for seconds in history) for phase in PHASES]


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
    envs = gym.make(task, disable_env_checker=True).unwrapped, make_env(task)
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


class EnvironmentTime:
    """Wraps the vector environments that a script makes, to add up the seconds in which it waits for them."""

    def __init__(self, module):
        self.seconds, make_vector_env = 0.0, module.make_vector_env
        module.make_vector_env = lambda args: self.watch(make_vector_env(args))

    def watch(self, envs):
        for name in ("reset_async", "reset_wait", "step_async", "step_wait"):
            setattr(envs, name, self.timed(getattr(envs, name)))
        return envs

    def timed(self, function):
        def call(*args, **kwargs):
            start = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += perf_counter() - start

        return call


def calls(function, args, least):
    """Call the function for at least so many CPU seconds -> calls per CPU second."""
    count, start = 0, process_time()
    while (seconds := process_time() - start) < least or not count:
        function(*args)
        count += 1
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
    env = SimpleNamespace(n_agents=N, _max_episode_steps=T, observation_space=[torch.empty(D)])
    env.action_space = [SimpleNamespace(n=6)]
    env.players = [SimpleNamespace(history=cells) for cells in torch.randint(15, (N, T + 1, 2)).tolist()]
    module.make_env = lambda *_: env
    module.collect = lambda *_: (obs, actions, logprobs, rewards, ~alive, alive)
    print(json.dumps(Training(module, *lbf_task(DEFAULT_TASK)).phases(least)))


def run(*arguments):
    """Run python with these arguments in the working directory -> stdout, CPU seconds, peak memory in MB."""
    variables = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", LAUNCHER, sys.executable, *map(str, arguments)]
    output = subprocess.run(command, env=os.environ | variables, stdout=subprocess.PIPE, check=True).stdout
    status, stdout, stderr, seconds, memory = json.loads(output)
    if status == 2:
        raise UserError(stderr)
    if status:
        raise RuntimeError(stderr or f"status {status}: out of memory?")
    return stdout, seconds, memory / (2**20 if sys.platform == "darwin" else 2**10)


def whole_runs(script, frames):
    """Frames per CPU second of a script as it is, run without evaluations: of a long run minus a short one."""
    command = [REPOSITORY / script, f"--env-id={TASK}", "--no-winner-take-all", *NO_EVALUATION]
    short, long = (run(*command, f"--total-timesteps={total}")[1] for total in (2000, 2000 + frames))
    return frames / (long - short)


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


def in_turns(reference, *others, repeats):
    """Speeds in turns, reference, other, reference, next other, ... -> for each other its (reference, other) pairs."""
    turns = [[(reference(), other()) for other in others] for _ in range(repeats)]
    return list(zip(*turns))


def reached(value, target, low_is_good=False):
    good = value <= target if low_is_good else value >= target
    return f"{'yes' if good else 'NO'} ({100 * (value / target - 1):+.0f} %)"


def comparison(name, pairs, target=None, text="{:,.0f}".format):
    """A row: both speeds and their ratio (medians), the ratio's range, the target and whether it is met."""
    speeds, ratios = [text(median(speeds)) for speeds in zip(*pairs)], [other / reference for reference, other in pairs]
    verdict = [f">= {target}", reached(median(ratios), target)] if target else ["", ""]
    return [name, *speeds, f"{median(ratios):.2f}", f"{min(ratios):.2f}..{max(ratios):.2f}", *verdict]


def main_smaclite(args):
    torch.set_num_threads(1)
    repeats, steps, least = (2, 10, 0.1) if args.quick else (min(args.repeats, 5), 150, 20.0)
    maps, size = (MAPS[:1], ["--num-envs=2"]) if args.quick else (MAPS, [])
    print_machine("two")
    ratio = ["ratio", "smallest..largest", "target", "reached"]
    modules = {SMACLITE: load(SMACLITE), SMACLITE_LOCAL: load(SMACLITE_LOCAL)}

    for library in ["numpy", "C++"] if importlib.util.find_spec("rvo2") else ["numpy"]:
        rows = []
        for name in maps:
            [pairs] = in_turns(*smaclite_players(modules[SMACLITE], name, library == "C++", steps), repeats=repeats)
            rows.append(comparison(name, pairs, 1.4 if library == "numpy" else None, text="{:,.1f}".format))
        table(f"SMAClite, environment steps/s, collisions by {library}", ["map", "stock", "ours", *ratio], rows)

    rows, phases = [], []
    stock, _ = smaclite_players(modules[SMACLITE], maps[0], False, steps, timer=perf_counter)
    for script, module in modules.items():
        waiting = EnvironmentTime(module)
        training = Training(module, f"--env-id={maps[0]}", "--num-workers=2", *size, timer=perf_counter)
        waiting.seconds, history, pairs = 0.0, [], []
        for _ in range(repeats):
            pairs.append((stock(), training.speed(least, history)))
        seconds = {phase: sum(iteration[phase] for iteration in history) for phase in PHASES}
        total = sum(seconds.values())
        rows.append(
            [*comparison(script, pairs, 1.8, text="{:,.1f}".format), f"{100 * (1 - waiting.seconds / total):.0f} %"]
        )
        phases.append([script, *(f"{1000 * x / len(history):.0f}" for x in [*seconds.values(), total])])
    header = ["script", "stock steps/s", "frames/s", *ratio, "time outside the environment"]
    table(f"Training frames/s with two workers against one stock environment, {maps[0]}", header, rows)
    table(f"Phases of an iteration (10 episodes of {maps[0]}), ms", ["script", *PHASES, "sum"], phases)


def main(args):
    clock, cpu = perf_counter(), process_time()
    torch.set_num_threads(1)
    repeats, least, steps = (2, 0.05, 200) if args.quick else (args.repeats, 0.5, 4000)
    print_machine("one")
    ratio = ["ratio", "smallest..largest", "target", "reached"]
    dg, local = load(DG), load(LOCAL)

    rows = []
    for task in TASKS:
        [pairs] = in_turns(*players(task, dg.make_env, steps), repeats=repeats if task == TASK else min(repeats, 5))
        rows.append(comparison(task, pairs, 4 if task == TASK else None))
    table("Environment steps/s (without winner-take-all)", ["task", "stock", "ours", *ratio], rows)

    stock, targets, header = players(TASK, dg.make_env, steps)[0], {LOCAL: 1.1, DG: 0.55}, ["script", "stock steps/s"]
    speeds = in_turns(
        stock, *(partial(Training(m, *lbf_task(TASK)).speed, least) for m in (local, dg)), repeats=repeats
    )
    rows = [comparison(script, pairs, targets[script]) for script, pairs in zip(targets, speeds)]
    table(f"Training frames/s against environment steps/s, {TASK}", [*header, "frames/s", *ratio], rows)

    rows = []
    for T, E, N, target in ((50, 10, 3, 15), (150, 10, 10, 25)):
        data, functions = episodes(T, E, N), (double_loop, dg.multi_agent_gae)
        [pairs] = in_turns(*(partial(calls, function, data, least / 2) for function in functions), repeats=repeats)
        row = comparison((T, E, N), pairs, target, text=lambda speed: f"{1000 / speed:.2f}")
        difference = (double_loop(*data) - dg.multi_agent_gae(*data)).abs().max().item()
        rows.append([*row, f"{difference:.0e}", reached(difference, 1e-4, low_is_good=True)])
    header = ["(T, E, N)", "double loop, ms", "multi_agent_gae, ms", *ratio, "largest difference", "<= 1e-4"]
    table("multi_agent_gae against its definition", header, rows)

    rows = []
    for script, module, task in ((s, m, t) for s, m in ((DG, dg), (LOCAL, local)) for t in (DEFAULT_TASK, TASK)):
        phases = Training(module, *lbf_task(task)).phases(4 * least)
        rows.append([script, task, *(f"{ms:.1f}" for ms in phases), f"{sum(phases):.1f}"])
    table("Phases of an iteration (10 episodes), ms", ["script", "task", *PHASES, "sum"], rows)
    print(f"\nUp to here the process had {100 * (process_time() - cpu) / (perf_counter() - clock):.0f} % of a core.")

    if args.end_to_end:
        runs = [partial(whole_runs, script, 5000 if args.quick else 50_000) for script in targets]
        speeds = in_turns(stock, *runs, repeats=1 if args.quick else min(repeats, 5))
        rows = [comparison(script, pairs, targets[script]) for script, pairs in zip(targets, speeds)]
        table(f"The same from whole runs of the scripts, {TASK}", ["script", "stock steps/s", "frames/s", *ratio], rows)

    memory = run(REPOSITORY / DG, f"--total-timesteps={500 if args.quick else 20_000}")[2]
    row = [DG, f"{memory:.0f} MB", "< 1000 MB", reached(memory, 1000, low_is_good=True)]
    table("Peak memory, default task", ["script", "peak", "target", "reached"], [row])

    rows, sizes = [], [(50, N) for N in (2, 4, 8, 16, 32, 64)] + [(T, 3) for T in (25, 50, 100, 200)]
    for T, N in [(50, 2), (25, 3)] if args.quick else sizes:
        try:
            output, _, memory = run("-c", f"import benchmark; benchmark.synthetic({T}, {N}, {2 * least})")
            phases = json.loads(output)
            rows.append([T, N, *(f"{ms:.1f}" for ms in [*phases[1:], sum(phases)]), f"{memory:.0f}"])
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
