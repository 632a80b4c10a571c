"""Time and memory of an iteration of spread.py by the number of agents, and of multi_agent_gae alone.

    python experiments/spread_scale.py --csv experiments/results/spread_scale.csv     # what docs/known-graph.md shows
    python experiments/spread_scale.py --num-agents 5 100 --algorithms mappo

Prints one line per algorithm and number of agents: milliseconds of each phase (median over the iterations), the share
of multi_agent_gae, the peak memory of the process, and what multi_agent_gae adds to it where nothing else has run. Time
is CPU time of one thread, so that other processes on the machine do not count. Each line is measured in processes of
its own. Linux and macOS only.
"""

import csv
import itertools
import multiprocessing
import resource
import statistics
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from errors import UserError, one_sentence

with one_sentence():
    import spread
    import torch
    import tyro

EPISODES = 10  # parallel episodes, spread.py's default


@dataclass
class Args:
    num_agents: tuple[int, ...] = (5, 20, 50, 100)
    """numbers of agents"""
    algorithms: tuple[Literal["mappo", "ippo"], ...] = ("ippo", "mappo")
    """spread.py's --algorithm"""
    iterations: int = 3
    """measured iterations, after a first one that does not count"""
    csv: str | None = None
    """also write the table to this file"""


def peak_memory():
    """Most memory that this process has ever used, in MB."""
    if sys.platform == "linux":  # whose ru_maxrss counts what the parent held when it started this process
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 1e3
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def measure_iteration(num_agents, algorithm, iterations):
    """Run the phases of an iteration of spread.py with the known graph -> milliseconds of each, peak memory in MB."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    args = spread.Args(algorithm=algorithm)
    env, device = spread.StarSpread(num_agents, EPISODES), torch.device("cpu")
    actor, critic = spread.make_networks(args, env)
    optimizers = [torch.optim.Adam(x.parameters(), lr=args.learning_rate, fused=True) for x in (actor, critic)]
    standardise = spread.RunningStandardisation()
    phases = defaultdict(list)

    def phase(name, function, *inputs):
        start = time.process_time()
        result = function(*inputs)
        phases[name].append(1000 * (time.process_time() - start))
        return result

    for _ in range(iterations + 1):
        obs, actions, logprobs, rewards = phase("collect", spread.collect, env, actor, device)
        rewards = phase("standardise", standardise, rewards)
        with torch.no_grad():
            values = phase("values", critic, obs)
        alive = torch.ones(rewards.shape[:2], dtype=torch.bool)
        experience = (rewards, values, ~alive, alive)
        value_targets = phase("gae", spread.gae, *experience, args.gamma, args.gae_lambda) + values[:-1]
        graph = spread.known_graph(num_agents).expand(*alive.shape, -1, -1)
        credit = *experience, graph, args.gamma, args.gae_lambda
        advantages = phase("multi_agent_gae", spread.multi_agent_gae, *credit)
        steps = (obs[:-1], actions, logprobs, advantages, value_targets)
        batch = spread.Batch(*(x.flatten(0, 1) for x in steps))
        phase("ppo_update", spread.ppo_update, actor, critic, *optimizers, batch, args)
    return {name: statistics.median(times[1:]) for name, times in phases.items()}, peak_memory()


def measure_memory(num_agents):
    """What multi_agent_gae on one iteration's data adds to the peak memory of a process, in MB."""
    torch.set_num_threads(1)
    T = spread.StarSpread.episode_length
    rewards, values = torch.randn((T, EPISODES, num_agents)), torch.randn((T + 1, EPISODES, num_agents))
    alive = torch.ones((T, EPISODES), dtype=torch.bool)
    tiny = spread.known_graph(2).expand(T, EPISODES, -1, -1)
    spread.multi_agent_gae(rewards[..., :2], values[..., :2], ~alive, alive, tiny, 0.99, 0.95)  # loads the libraries
    before = peak_memory()
    graph = spread.known_graph(num_agents).expand(T, EPISODES, -1, -1)
    spread.multi_agent_gae(rewards, values, ~alive, alive, graph, 0.99, 0.95)
    return peak_memory() - before


def in_new_process(function, *inputs):
    """function(*inputs), in a fresh process: peak memory is that of a process's whole life; UserError if it dies."""
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, *inputs).result()
    except BrokenProcessPool as error:
        raise UserError(f"{function.__name__}{inputs} was killed: out of memory?") from error


def main(args):
    """Measure, print and write the table; raises UserError."""
    if min(args.num_agents, default=0) < 2 or args.iterations < 1 or not args.algorithms:
        raise UserError("--num-agents must be at least 2 each, --iterations at least 1, --algorithms at least one")
    if args.csv and not Path(args.csv).parent.is_dir():
        raise UserError(f"--csv {args.csv}: there is no such folder")
    rows = []
    for algorithm, num_agents in itertools.product(args.algorithms, args.num_agents):
        phases, memory = in_new_process(measure_iteration, num_agents, algorithm, args.iterations)
        total = sum(phases.values())
        row = {"algorithm": algorithm, "N": num_agents} | {f"{name} ms": round(ms, 1) for name, ms in phases.items()}
        row |= {"iteration ms": round(total, 1), "multi_agent_gae %": round(100 * phases["multi_agent_gae"] / total, 1)}
        row |= {"process MB": round(memory), "multi_agent_gae MB": round(in_new_process(measure_memory, num_agents))}
        if not rows:
            print(" | ".join(row))
        print(" | ".join(map(str, row.values())), flush=True)
        rows.append(row)
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    with one_sentence():
        main(tyro.cli(Args))
