"""A small game with SMAClite's interface, so that the SMAClite scripts' own code runs where smaclite is not installed.

    python tests/fake_smaclite.py fake update mappo_dg_smaclite.py --num-envs 2 ...

runs a script on it ("smaclite": on the real game) as a process of its own, with one of FAULTS in it ("": none).
"""

import ast
import contextlib
import copy
import inspect
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import gymnasium as gym
import numpy as np
import torch

SMACLITE_SCRIPTS = ["mappo_dg_smaclite.py"]
SMACLITE_SCRIPTS += [f"baselines/mappo_{rewards}_smaclite.py" for rewards in ("local", "global")]
N, D, S, A = 3, 6, 8, 4  # agents, observation size, state size, actions
NOTHING, REST, ATTACK, HEAL = range(A)
ROLLOUT = "obs state avail active actions logprobs rewards terminated alive won".split()  # of collect, in order
SPIED = "collect evaluate gae multi_agent_gae learned_graph ppo_update update_graph_models".split()


class FakeGame(gym.Env):
    """Three agents against one enemy, who hits one of them in each step; everything is drawn from the seed of reset.

    Attributes, spaces, info and what is left of a game that has ended are those of MultiAgentSMAClite, with one
    exception: battle_won is true in the step of the victory only, so that whoever looks later has to remember it.
    Games are won, lost and truncated, agents die in most of them, and the dead have their share of a victory.
    AssertionError if an action is not available.
    """

    n_agents, obs_size, state_size, n_actions = N, D, S, A

    def __init__(self, env_id="fake", use_cpp_rvo2=False, time_limit=10):
        self.time_limit = time_limit
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (N, D), np.float32)
        self.action_space = gym.spaces.MultiDiscrete([A] * N)

    def reset(self, seed=None, options=None):
        self.rng = np.random.default_rng(seed)
        self.health = self.rng.integers(1, 6, N)
        self.enemy = int(self.rng.integers(2, 14))
        self.elapsed, self.ended = 0, None
        obs, info = self._look(np.zeros(N), won=False)
        return obs, info

    def step(self, actions):
        if self.ended:
            return self.ended
        assert self.avail[np.arange(N), actions].all(), "an action is not available"
        living = self.health > 0
        earned = np.where(actions == ATTACK, self.rng.uniform(0.5, 1.5, N), self.rng.uniform(-0.1, 0.1, N) * living)
        self.enemy -= int((actions == ATTACK).sum())
        self.health += living & np.roll(actions == HEAL, 1)  # agent i heals agent i + 1
        self.health[self.rng.choice(living.nonzero()[0])] -= 1
        self.elapsed += 1
        won = self.enemy <= 0
        terminated = bool(won or (self.health <= 0).all())
        truncated = not terminated and self.elapsed >= self.time_limit
        obs, info = self._look(earned + 2.0 * won, won)
        if terminated or truncated:
            left = info | {"rewards": np.zeros(N, np.float32), "battle_won": False}
            self.ended = obs, 0.0, terminated, truncated, left
        return obs, float(info["rewards"].sum()), terminated, truncated, info

    def _look(self, rewards, won):
        """Observations (N, D) of the health, the enemy and noise, and info."""
        living = self.health > 0
        self.avail = self.rng.random((N, A)) < 0.7
        self.avail[:, REST] = True
        self.avail &= living[:, None]
        self.avail[:, NOTHING] = ~living
        obs = self.rng.normal(size=(N, D))
        obs[:, 0], obs[:, 1] = self.health, self.enemy
        obs = np.where(living[:, None], obs, 0.0).astype(np.float32)
        state = np.concatenate([self.health, [self.enemy], self.rng.normal(size=S - N - 1)]).astype(np.float32)
        info = {"rewards": rewards.astype(np.float32), "avail_actions": self.avail.copy(), "state": state}
        return obs, info | {"alive": living.copy(), "battle_won": bool(won)}


class FakeVectorEnv(gym.vector.VectorEnv):
    """FakeGames one after the other in this process, behind the calls of AsyncVectorEnv that the scripts make."""

    def __init__(self, num_envs):
        self.num_envs, self.games = num_envs, [FakeGame() for _ in range(num_envs)]
        self.single_observation_space = self.games[0].observation_space
        self.single_action_space = self.games[0].action_space
        self.pending, self.ended = None, False

    def reset_async(self, seed=None, options=None):
        assert self.pending is None and len(seed) == self.num_envs and all(type(number) is int for number in seed)
        self.pending = "reset", seed

    def reset_wait(self, timeout=None):
        (name, seeds), self.pending = self.pending, None
        assert name == "reset" and timeout is not None  # a process that is stuck must not stop the run for ever
        return self._together([game.reset(seed=number) for game, number in zip(self.games, seeds)])

    def step_async(self, actions):
        assert self.pending is None and actions.shape == (self.num_envs, N)
        self.pending = "step", np.array(actions)

    def step_wait(self, timeout=None):
        (name, actions), self.pending = self.pending, None
        assert name == "step" and timeout is not None
        return self._together([game.step(action) for game, action in zip(self.games, actions)])

    def _together(self, results):
        infos = {}
        for index, (*_, info) in enumerate(results):
            infos = self._add_info(infos, info, index)
        columns = [np.stack(column) for column in list(zip(*results))[:-1]]
        return *columns, infos

    def close(self, **kwargs):
        self.ended = True


@dataclass
class Replay:
    """A game played alone: its arrays begin with its first step; obs, state have the one after the last step too."""

    obs: np.ndarray  # (L+1, N, D)
    state: np.ndarray  # (L+1, S)
    avail: np.ndarray  # (L, N, A)
    active: np.ndarray  # (L, N)
    rewards: np.ndarray  # (L, N)
    actions: np.ndarray  # (L, N)
    terminated: bool
    truncated: bool
    won: bool


def replay(seed, choose):
    """Play the game of that seed with choose(t, obs (N, D), avail (N, A)) -> actions (N)."""
    game, ended, t = FakeGame(), False, 0
    obs, info = game.reset(seed=int(seed))
    seen, steps = [(obs, info["state"])], []
    while not ended:
        avail, active = info["avail_actions"], info["alive"]
        actions = np.asarray(choose(t, obs, avail))
        obs, _, terminated, truncated, info = game.step(actions)
        seen.append((obs, info["state"]))
        steps.append((avail, active, info["rewards"], actions))
        ended, t = terminated or truncated, t + 1
    arrays = [np.stack(column) for column in (*zip(*seen), *zip(*steps))]
    return Replay(*arrays, terminated, truncated, info["battle_won"])


def replays(seeds, actions):
    """The games of the seeds alone, with the actions (T, E, N) of a rollout."""
    return [replay(seed, lambda t, *_, e=e: actions[t, e].numpy()) for e, seed in enumerate(seeds)]


def replay_greedily(seed, actor):
    """The game of that seed with the actor's most likely actions, its memory handed on from step to step."""
    memory = None

    @torch.no_grad()
    def choose(t, obs, avail):
        nonlocal memory
        policy, memory = actor(torch.from_numpy(obs)[None, None], torch.from_numpy(avail)[None, None], memory)
        return policy[0, 0].argmax(-1).numpy()

    return replay(seed, choose)


def install(module, patch):
    """Put the fake into a script's module; patch: a pytest.MonkeyPatch."""
    patch.setattr(module, "HAVE_SMACLITE", True)
    patch.setattr(module, "make_env", FakeGame)
    patch.setattr(module, "make_vector_env", lambda args: FakeVectorEnv(args.num_envs))


@dataclass
class Call:
    """One call of a script's function: what it was given, by parameter (networks as they were), and its result."""

    name: str
    caller: "Call | None"  # the call of a spied function that it was made in; None: in main
    given: dict
    raw: dict  # the same without copies
    pytorch: dict  # its settings at that time
    result: object = None


def spy(module, patch, names=SPIED):
    """Record the calls of these functions of a script -> list that grows, in the order of their beginnings."""
    calls, stack = [], [None]

    def watched(name, original):
        signature = inspect.signature(original)

        def call(*args, **kwargs):
            raw = dict(signature.bind(*args, **kwargs).arguments)
            given = {key: copy.deepcopy(x) if isinstance(x, torch.nn.Module) else x for key, x in raw.items()}
            pytorch = {"threads": torch.get_num_threads()}
            record = Call(name, stack[-1], given, raw, pytorch)
            calls.append(record)
            stack.append(record)
            try:
                record.result = original(*args, **kwargs)
            finally:
                stack.pop()
            return record.result

        return call

    for name in names:
        if hasattr(module, name):
            patch.setattr(module, name, watched(name, getattr(module, name)))
    return calls


@contextlib.contextmanager
def handlers_kept():
    """Signal handlers that main() sets are gone afterwards."""
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def fail_in_the_second_update(script):
    original, calls = script.ppo_update, []

    def ppo_update(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("injected")
        return original(*args, **kwargs)

    script.ppo_update = ppo_update


def fail_in_a_game(script):
    """In the worker processes."""
    original, calls = FakeGame.step, []

    def step(self, actions):
        calls.append(None)
        if len(calls) == 200:
            raise RuntimeError("injected")
        return original(self, actions)

    FakeGame.step = step


def play_for_ever(script):
    """A step of a game does not end, some time after the beginning."""
    original, calls = FakeGame.step, []

    def step(self, actions):
        calls.append(None)
        if len(calls) >= 200:
            time.sleep(3600)
        return original(self, actions)

    FakeGame.step = step


FAULTS = {"": lambda script: None, "update": fail_in_the_second_update, "game": fail_in_a_game, "stuck": play_for_ever}


def run_as_a_script(path, world, fault):
    """Run the file as __main__; before its last statement, which calls main(), fake and fault are put in."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    ending = tree.body.pop()
    script = sys.modules["__main__"] = ModuleType("__main__")
    script.__file__ = path
    exec(compile(tree, path, "exec"), vars(script))
    if world == "fake":
        script.HAVE_SMACLITE = True
        script.make_env = FakeGame
    FAULTS[fault](script)
    exec(compile(ast.Module([ending], []), path, "exec"), vars(script))


if __name__ == "__main__":
    _, world, fault, *sys.argv = sys.argv
    run_as_a_script(sys.argv[0], world, fault)
