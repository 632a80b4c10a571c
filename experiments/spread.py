# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<=2.13.0", "numpy", "tyro", "tensorboard", "tqdm"]
# ///
"""MAPPO and IPPO with the known dependence graph, local or global rewards on star-spread (arXiv 2601.21523, version 2).

Agents move in the plane. Each leaf is paid for being near any landmark, the hub (agent 0) for every landmark that has
an agent near it: so every agent influences the hub and itself, and nobody else.

    python experiments/spread.py --algorithm ippo --credit dg --env-id star-spread-5
    python experiments/spread.py --algorithm mappo --credit global --env-id star-spread-20 --seed 2

Axes are (T, E, N, ...): time step, environment, agent. A pair is (..., i, j): i is the influencer, j the influenced.
B: all steps in one row; D: observation size; A: actions.
"""

import io
import os
import re
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]
    """the name of this experiment"""
    seed: int = 1
    """seed of the networks, the environments and every random draw"""
    torch_deterministic: bool = True
    """if toggled, PyTorch uses deterministic algorithms only"""
    cuda: bool = False
    """use a GPU (networks this small are faster on a core); set CUBLAS_WORKSPACE_CONFIG=:4096:8 in the environment"""
    num_threads: int = 1
    """PyTorch threads"""
    save_model: bool = False
    """save a checkpoint at the end, also when --checkpoint-interval is 0"""
    checkpoint_interval: int = 100_000
    """frames between two checkpoints (0: none but those of --save-model and of an interrupted run)"""
    resume: str | None = None
    """path of a checkpoint.pt: continue that run exactly, in its own folder, also beyond --total-timesteps"""

    algorithm: Literal["mappo", "ippo"] = "ippo"
    """what the critic sees: the positions of all agents (mappo) or each agent's own observation (ippo)"""
    credit: Literal["dg", "local", "global"] = "dg"
    """an agent learns from the rewards it can have influenced by the known graph, from its own, or from the team's"""
    env_id: str = "star-spread-5"
    """star-spread-N: N agents, the hub included, and N landmarks"""
    total_timesteps: int = 5_000_000
    """frames: environment steps summed over the environments"""
    num_envs: int = 10
    """parallel environments, each plays one whole episode per iteration"""
    eval_interval: int = 50_000
    """frames between two evaluations"""
    eval_episodes: int = 100
    """episodes of an evaluation"""
    eval_greedy: bool = False
    """evaluate with the most likely actions instead of sampled ones"""

    hidden_dim: int = 128
    """units of each hidden layer of policy and critic"""
    learning_rate: float = 5e-4
    """learning rate of every Adam"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimation"""
    update_epochs: int = 4
    """gradient steps per iteration, each on the whole batch"""
    norm_reward: bool = True
    """standardise the rewards that agents learn from; evaluations report the raw ones"""
    norm_adv: bool = False
    """normalise the advantages"""
    clip_coef: float = 0.2
    """PPO's clipping coefficient"""
    ent_coef: float = 0.001
    """coefficient of the entropy bonus"""
    max_grad_norm: float = 10.0
    """largest norm of the policy's and of the critic's gradient"""
    soft: bool = True
    """mix hard path weights with lambda (robust to a noisy graph); --no-soft: hard weights"""


class UserError(Exception):
    """Ends the script with its one sentence on stderr and exit status 2."""


def check_args(args):
    """Raise UserError for the first setting that makes no sense."""
    counts = "total_timesteps num_envs eval_interval eval_episodes update_epochs hidden_dim num_threads"
    amounts = "seed checkpoint_interval learning_rate clip_coef ent_coef max_grad_norm"
    fractions = "gamma gae_lambda"
    for names, low, high in ((counts, 1, torch.inf), (amounts, 0, torch.inf), (fractions, 0, 1)):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                raise UserError(f"{name} must lie in [{low}, {high}], not {getattr(args, name)}")
    make_env(args.env_id, 1)
    if args.total_timesteps < (frames := args.num_envs * StarSpread.episode_length):
        raise UserError(f"total_timesteps is {args.total_timesteps}, below one iteration ({frames} frames)")


# ENVIRONMENT
class StarSpread:
    """E environments of N agents and N landmarks, evenly spaced on a circle of radius 0.7, stepped all at once.

    Hub (agent 0): minus the sum over landmarks of the distance to the nearest agent. Leaf: minus its distance to the
    nearest landmark. Each agent's reward has Gaussian noise of standard deviation `noise`. Episodes start uniformly in
    [-1, 1]^2 and are cut after 50 steps, which is no terminal state.
    """

    # the paper leaves the moves open: our step of 0.1 crosses the square in 20 of the 50 steps, nothing stops an agent
    moves = 0.1 * np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # stay, west, east, south, north
    episode_length = 50

    def __init__(self, num_agents, num_envs, seed=0, noise=1.0):
        self.N, self.E, self.noise = num_agents, num_envs, noise
        self.D, self.A = 4 * num_agents + 2, len(self.moves)
        angle = 2 * np.pi * np.arange(num_agents) / num_agents
        self.landmarks = 0.7 * np.stack([np.cos(angle), np.sin(angle)], -1)  # (N, 2)
        self.np_random = np.random.default_rng(seed)

    def reset(self):
        """Start an episode in every environment -> observations (E, N, D)."""
        self.positions = self.np_random.uniform(-1, 1, (self.E, self.N, 2))
        return self.observe()

    def step(self, actions):
        """Move every agent: actions (E, N) of 0..4 -> observations (E, N, D) and rewards (E, N) after the move."""
        self.positions += self.moves[actions]
        squared = sum((self.positions[:, :, None, xy] - self.landmarks[:, xy]) ** 2 for xy in (0, 1))  # (E, N, N)
        rewards = -np.sqrt(squared.min(2))  # of each agent to the nearest landmark
        rewards[:, 0] = -np.sqrt(squared.min(1)).sum(-1)  # of each landmark to the nearest agent
        return self.observe(), rewards + self.noise * self.np_random.standard_normal(rewards.shape)

    def observe(self):
        """Own position, all landmarks, and all agents' positions, zeros for leaves: they do not see the others."""
        obs = np.zeros((self.E, self.N, self.D), dtype=np.float32)  # one size for the network that all agents share
        obs[..., :2], obs[..., 2 : 2 * self.N + 2] = self.positions, self.landmarks.ravel()
        obs[:, 0, 2 * self.N + 2 :] = self.positions.reshape(self.E, -1)
        return obs


def make_env(env_id, num_envs, seed=0):
    """The environments of star-spread-N; UserError for another name or a number of agents below 2."""
    num_agents = re.fullmatch(r"star-spread-(\d+)", env_id)
    if not num_agents or int(num_agents[1]) < 2:
        raise UserError(f"unknown environment {env_id}: env_id must be star-spread-N, N agents, at least 2")
    return StarSpread(int(num_agents[1]), num_envs, seed)


def known_graph(num_agents):
    """The true dependence graph, (N_i, N_j) bool: every agent influences the hub, j = 0, and itself."""
    graph = torch.eye(num_agents, dtype=torch.bool)
    graph[:, 0] = True
    return graph


class RunningStandardisation(nn.Module):
    """Rewards minus their mean, divided by their standard deviation, per agent and over all of training so far.

    This is EPyMARL's `standardise_rewards`: the batch (T, E, N) first updates mean and variance (Chan et al. 1983).
    """

    def __init__(self, num_agents):
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_agents, dtype=torch.double))
        self.register_buffer("var", torch.ones(num_agents, dtype=torch.double))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.double))

    def forward(self, rewards):
        batch = rewards.flatten(0, 1).double()  # (T E, N)
        count, gap = self.count + len(batch), batch.mean(0) - self.mean
        squares = self.var * self.count + batch.var(0, correction=0) * len(batch)
        self.var = (squares + gap**2 * self.count * len(batch) / count) / count
        self.mean, self.count = self.mean + gap * len(batch) / count, count
        return ((rewards - self.mean) / self.var.sqrt().clamp(min=1e-8)).float()


# NETWORKS
class AgentNetwork(nn.Module):
    """Two hidden layers on [x, one-hot agent id], shared by all agents: x (..., N, in_dim) -> (..., N, out_dim).

    The first is W x + U[agent], so that an x common to all agents, (..., 1, in_dim), is not repeated for each of them.
    """

    def __init__(self, in_dim, num_agents, hidden_dim, out_dim):
        super().__init__()
        self.input, self.agent_id = nn.Linear(in_dim, hidden_dim), nn.Embedding(num_agents, hidden_dim)
        nn.init.uniform_(self.agent_id.weight, -((in_dim + num_agents) ** -0.5), (in_dim + num_agents) ** -0.5)
        self.hidden, self.output = nn.Linear(hidden_dim, hidden_dim), nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        x = torch.relu(self.input(x) + self.agent_id.weight)
        return self.output(torch.relu(self.hidden(x)))


class OwnCritic(AgentNetwork):
    """Decentralised critic: each agent's value from its own observation, (..., N, D) -> (..., N)."""

    def forward(self, obs):
        return super().forward(obs).squeeze(-1)


class StateCritic(AgentNetwork):
    """Centralised critic: each agent's value from the state, (..., N, D) -> (..., N).

    The state is what the hub observes, all landmarks and positions (4 N): N padded observations would be 4 N^2 + 2 N.
    """

    def forward(self, obs):
        return super().forward(obs[..., :1, 2:]).squeeze(-1)


def make_networks(args, env):
    """Policy and critic for the environment."""
    actor = AgentNetwork(env.D, env.N, args.hidden_dim, env.A)
    if args.algorithm == "mappo":
        return actor, StateCritic(env.D - 2, env.N, args.hidden_dim, 1)
    return actor, OwnCritic(env.D, env.N, args.hidden_dim, 1)


# ADVANTAGES
def gae(rewards, values, terminated, alive, gamma, gae_lambda):
    """Every agent's own generalized advantage estimate (Schulman et al. 2016) over whole, padded episodes.

    rewards (T, E, N), values (T+1, E, N), terminated and alive (T, E) -> (T, E, N), 0 in the padding. An episode that
    ends without `terminated` bootstraps from the value after its last step.
    """
    alive, terminated = alive.bool().unsqueeze(-1), terminated.bool().unsqueeze(-1)  # (T, E, 1)
    next_values = values[1:].masked_fill(terminated, 0.0)
    deltas = (rewards + gamma * next_values - values[:-1]).masked_fill(~alive, 0.0)
    discounts = gamma * gae_lambda * (alive & ~terminated).to(deltas.dtype)
    advantages = torch.zeros_like(deltas)
    last = torch.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        last = torch.addcmul(deltas[t], discounts[t], last, out=advantages[t])
    return advantages


def meeting_times(graph, alive):
    """First time m >= t at which something that i did at t can have reached j, along edges of t, t+1, ..., m.

    graph (T, E, N, N) bool, alive (T, E) -> (T, E, N_i, N_j) float, inf if the episode ends before. An edge i -> j at t
    gives m_t[i, j] = t; otherwise m_t[i, j] = min over k with an edge i -> k of m_t+1[k, j]: one backward sweep.
    """
    T, E, N, _ = graph.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    edges = (graph.bool() | eye) & alive.bool()[..., None, None]
    # adding inf where there is no edge i -> k leaves the minimum to the k that i influences
    penalty = torch.zeros(edges.shape, device=graph.device).masked_fill(~edges, torch.inf).unsqueeze(-1)
    times = torch.empty(edges.shape, device=graph.device)
    following = torch.full((E, N, N), torch.inf, device=graph.device)  # m_t+1[k, j]
    for t in reversed(range(T)):
        following.diagonal(dim1=-2, dim2=-1).fill_(t)  # via k = j: an edge i -> j now
        following = (penalty[t] + following.unsqueeze(-3)).amin(-2)
        times[t] = following
    return times


def multi_agent_gae(rewards, values, terminated, alive, graph, gamma, gae_lambda, soft=True):
    """Advantage of agent i: the TD errors of every agent j, counted from the first meeting time of i and j.

        hard: A^i_t = sum_j (gamma lambda)^(m - t) GAE^j_m with m = m_t[i, j], 0 if they never meet
        soft: (1 - lambda) sum_j GAE^j_t + lambda * hard

    which equals the paper's double sum over path weights, in O(T). Shapes as in gae and meeting_times -> (T, E, N).
    """
    alive = alive.bool()
    own = gae(rewards, values, terminated, alive, gamma, gae_lambda)  # (T, E, N)
    met = meeting_times(graph, alive)  # (T, E, N_i, N_j)
    never = met.isinf()
    delay = met - torch.arange(len(met), device=met.device).view(-1, 1, 1, 1)
    at_meeting = own.unsqueeze(2).expand(met.shape).gather(0, met.masked_fill(never, 0).long())  # GAE^j_m
    hard = ((gamma * gae_lambda) ** delay * at_meeting).masked_fill(never, 0.0).sum(-1)
    return (1 - gae_lambda) * own.sum(-1, keepdim=True) + gae_lambda * hard if soft else hard


# ROLLOUT
@torch.no_grad()
def collect(env, actor, device, greedy=False):
    """Play one whole episode in every environment.

    Returns obs (T+1, E, N, D) with the observation after the last step, actions, logprobs, rewards (T, E, N).
    """
    T, E, N = env.episode_length, env.E, env.N
    obs = np.zeros((T + 1, E, N, env.D), dtype=np.float32)
    actions, logprobs = torch.zeros((T, E, N), dtype=torch.long), torch.zeros((T, E, N))
    rewards = np.zeros((T, E, N), dtype=np.float32)
    obs[0] = env.reset()
    for t in range(T):
        policy = actor(torch.from_numpy(obs[t]).to(device)).log_softmax(-1).cpu()  # (E, N, A)
        # Gumbel-max: the argmax of log-probabilities plus Gumbel noise is a sample, at a third of Categorical's cost
        noise = 0.0 if greedy else torch.empty_like(policy).exponential_().log()
        actions[t] = (policy - noise).argmax(-1)
        logprobs[t] = policy.gather(-1, actions[t].unsqueeze(-1)).squeeze(-1)
        obs[t + 1], rewards[t] = env.step(actions[t].numpy())
    return [torch.as_tensor(x).to(device) for x in (obs, actions, logprobs, rewards)]


# PPO UPDATE
def gradient_step(optimizer, loss, name, max_grad_norm=torch.inf):
    """One step of the optimizer; UserError if the loss or its gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):
        raise UserError(f"{name} is {loss.item()} and the norm of its gradient {norm.item()}")
    optimizer.step()


def ppo_update(actor, critic, actor_optimizer, critic_optimizer, obs, actions, logprobs, advantages, returns, args):
    """update_epochs times a critic step, then a policy step, each on the whole batch (Schulman et al. 2017).

    obs (B, N, D), the others (B, N) -> means over the epochs. UserError if a loss is not finite.
    """
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8) if args.norm_adv else advantages
    history = []
    for _ in range(args.update_epochs):
        value_loss = 0.5 * ((critic(obs) - returns) ** 2).mean()
        gradient_step(critic_optimizer, value_loss, "value_loss", args.max_grad_norm)

        policy = actor(obs).log_softmax(-1)  # (B, N, A)
        entropy = -(policy.exp() * policy).sum(-1).mean()
        logratio = policy.gather(-1, actions.unsqueeze(-1)).squeeze(-1) - logprobs  # (B, N)
        ratio = logratio.exp()
        clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped).mean()
        gradient_step(actor_optimizer, policy_loss - args.ent_coef * entropy, "policy_loss", args.max_grad_norm)

        approx_kl = (ratio - 1 - logratio).mean()
        clipfrac = ((ratio - 1).abs() > args.clip_coef).float().mean()
        history.append(torch.stack([value_loss, policy_loss, entropy, approx_kl, clipfrac, ratio.mean()]).detach())
    names = ("value_loss", "policy_loss", "entropy", "approx_kl", "clipfrac")
    return dict(zip(names, torch.stack(history).mean(0))) | {"first_ratio": history[0][-1]}


# EVALUATION
def evaluate(actor, args, index, device):
    """Play eval_episodes episodes of a fresh environment -> per-agent raw returns (episodes, N).

    Starts and noise depend on args.seed and the index of the evaluation alone: every method plays the same ones.
    """
    seed = np.random.SeedSequence([args.seed, index]).generate_state(1)[0]
    env, returns = make_env(args.env_id, args.num_envs, seed), []
    with torch.random.fork_rng(devices=[]):  # training goes on as if there had been no evaluation
        torch.manual_seed(int(seed))
        for _ in range(0, args.eval_episodes, args.num_envs):  # in turns: 100 episodes of 100 agents would be 0.8 GB
            returns.append(collect(env, actor, device, args.eval_greedy)[3].sum(0).cpu())
    return torch.cat(returns)[: args.eval_episodes]


# CHECKPOINTS
def write_atomically(path, data):
    """Write bytes to a temporary file and rename it: whenever the process is killed, path is whole, old or new."""
    with open(path + ".tmp", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(path + ".tmp", path)


def parse_args(script):
    """The checked command line and, under --resume, the checkpoint, which provides the settings that are not given."""
    args, checkpoint = tyro.cli(Args), None
    if args.resume:
        try:
            checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
            writer, saved = checkpoint["script"], dict(checkpoint["args"])
            older = any("evaluation" not in row for row in checkpoint["evaluations"])  # whose rows lack columns
        except Exception as error:
            raise UserError(f"--resume: {args.resume} is not a whole checkpoint ({type(error).__name__})") from error
        if writer != script or saved.keys() != vars(args).keys() or older:
            raise UserError(f"--resume: {args.resume} was written by {writer}.py or by another version of it")
        args = tyro.cli(Args, default=Args(**saved))
        free = "resume save_model checkpoint_interval".split()
        for name in saved.keys() - free:
            if getattr(args, name) != saved[name] and (name != "total_timesteps" or args.total_timesteps < saved[name]):
                raise UserError(f"--resume: {name} is {getattr(args, name)} here, {saved[name]} in the checkpoint")
    check_args(args)
    return args, checkpoint


def main():
    # SET-UP
    script = os.path.basename(__file__)[: -len(".py")]
    args, checkpoint = parse_args(script)
    method = f"{args.exp_name}_{args.algorithm}_{args.credit}"
    run_name = f"{args.env_id}__{method}__{args.seed}__{int(time.time())}"
    run_dir = os.path.dirname(os.path.abspath(args.resume)) if checkpoint else os.path.join("runs", run_name)
    if not checkpoint and os.path.exists(run_dir):
        raise UserError(f"the run folder {run_dir} exists and is never overwritten")
    device = torch.device("cuda" if args.cuda and torch.cuda.is_available() else "cpu")
    if args.cuda and device.type == "cpu":
        print(f"{script}: CUDA is not available, the CPU is used", file=sys.stderr)
    stop_signals = []  # looked at between two iterations
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, _: stop_signals.append(signum))
    torch.set_num_threads(args.num_threads)
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.manual_seed(args.seed)  # PyTorch's CPU generator is the only random stream besides the environment's own
    env = make_env(args.env_id, args.num_envs, args.seed)
    actor, critic = (network.to(device) for network in make_networks(args, env))
    standardise = RunningStandardisation(env.N).to(device)
    graph = known_graph(env.N).to(device)
    adam = {"lr": args.learning_rate, "eps": 1e-5, "fused": True}
    actor_optimizer = torch.optim.Adam(actor.parameters(), **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    trained = {"actor": actor, "critic": critic, "standardise": standardise}
    trained |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    global_step, iteration, evaluations, saved_step = 0, 0, [], -1
    if checkpoint:
        global_step, iteration, evaluations = (checkpoint[key] for key in ("global_step", "iteration", "evaluations"))
        for name, part in trained.items():
            part.load_state_dict(checkpoint[name])
        env.np_random.bit_generator.state = checkpoint["env"]
        torch.set_rng_state(checkpoint["torch_rng"])
    writer = SummaryWriter(run_dir, purge_step=global_step + 1 if checkpoint else None)
    settings = "\n".join(f"|{name}|{value}|" for name, value in vars(args).items())
    writer.add_text("hyperparameters", "|param|value|\n|-|-|\n" + settings)
    print(f"{run_dir}: {env.N} agents, {env.D} observations, {args.num_envs} episodes per iteration, {device}")
    bar = tqdm(total=args.total_timesteps, initial=global_step, unit=" frames", unit_scale=True, mininterval=1.0)
    start_time, start_step = time.time(), global_step

    while True:
        # EVALUATE (first the untrained policy)
        finished = global_step >= args.total_timesteps
        every, last = args.eval_interval, evaluations[-1]["global_step"] if evaluations else -1
        if not stop_signals and (global_step // every > last // every or finished and global_step > last):
            returns = evaluate(actor, args, global_step // every, device)  # (episodes, N)
            team, agents = returns.sum(-1), returns.mean(0).tolist()
            row = {"episodic_return": team.mean().item(), "episodic_return_std": team.std(correction=0).item()}
            row |= {"episodes": len(team)} | {f"episodic_return_agent_{i}": mean for i, mean in enumerate(agents)}
            for name, value in row.items():
                writer.add_scalar(f"eval/{name}", value, global_step)
            index = global_step // every
            when = {"global_step": global_step, "evaluation": index, "nominal_step": index * every}
            evaluations.append(when | row)
            lines = [evaluations[0].keys(), *(row.values() for row in evaluations)]
            text = "".join(",".join(map(str, line)) + "\n" for line in lines)
            write_atomically(os.path.join(run_dir, "evaluations.csv"), text.encode())

        # SAVE
        every = args.checkpoint_interval
        due = every and (finished or global_step // every > saved_step // every)
        if due or stop_signals or finished and args.save_model:
            state = {name: part.state_dict() for name, part in trained.items()}
            state |= {"script": script, "args": vars(args), "evaluations": evaluations, "iteration": iteration}
            state |= {"global_step": global_step, "torch_rng": torch.get_rng_state()}
            state["env"] = env.np_random.bit_generator.state
            torch.save(state, buffer := io.BytesIO())
            write_atomically(os.path.join(run_dir, "checkpoint.pt"), buffer.getvalue())
            saved_step = global_step
        if finished or stop_signals:
            break

        # COLLECT
        iteration += 1
        obs, actions, logprobs, raw_rewards = collect(env, actor, device)  # (T, E, N, ...)
        global_step += actions[..., 0].numel()
        rewards = raw_rewards
        if args.credit == "global":
            rewards = rewards.sum(-1, keepdim=True).expand_as(rewards)  # (T, E, N), the team's for every agent
        rewards = standardise(rewards) if args.norm_reward else rewards

        # ADVANTAGES
        with torch.no_grad():
            values = critic(obs)  # (T+1, E, N)
        alive = torch.ones(rewards.shape[:2], dtype=torch.bool, device=device)  # (T, E): no episode ends before T,
        experience = rewards, values, ~alive, alive  # and none in a terminal state
        advantages = gae(*experience, args.gamma, args.gae_lambda)  # (T, E, N)
        returns = advantages + values[:-1]  # the critic's target ignores the graph
        if args.credit == "dg":
            graphs = graph.expand(*alive.shape, env.N, env.N)  # (T, E, N_i, N_j)
            advantages = multi_agent_gae(*experience, graphs, args.gamma, args.gae_lambda, args.soft)

        # UPDATE POLICY AND CRITIC
        batch = [x.flatten(0, 1) for x in (obs[:-1], actions, logprobs, advantages, returns)]  # (B, N, ...)
        try:
            losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, *batch, args)
        except UserError as error:
            bar.close()
            last = f"the last checkpoint is of frame {saved_step}" if saved_step >= 0 else "there is no checkpoint"
            raise UserError(f"iteration {iteration}: {error}; {last}") from error

        # LOG
        losses["explained_variance"] = 1 - (returns - values[:-1]).var() / returns.var()
        episodes = raw_rewards.sum(0).mean(0)  # (N), mean return of each agent
        charts = {"episodic_return": episodes.sum(), "hub_return": episodes[0], "leaf_return": episodes[1:].mean()}
        charts |= {"learning_rate": args.learning_rate, "SPS": (global_step - start_step) / (time.time() - start_time)}
        for group, metrics in (("charts", charts), ("losses", losses)):
            for name, value in metrics.items():
                writer.add_scalar(f"{group}/{name}", float(value), global_step)
        bar.set_postfix(eval=f"{evaluations[-1]['episodic_return']:.1f}")
        bar.update(global_step - bar.n)

    bar.close()
    writer.close()
    sys.exit(128 + stop_signals[0] if stop_signals else 0)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(__file__)}: {error}", file=sys.stderr)
        sys.exit(2)
