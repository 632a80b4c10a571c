# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4,<=2.13.0", "numpy", "tyro", "tensorboard", "tqdm"]
# ///
"""MAPPO and IPPO with dependence graphs, local or global rewards on star-spread (arXiv 2601.21523, version 2).

Agents move in the plane. Each leaf is paid for being near any landmark, the hub (agent 0) for every landmark that has
an agent near it: so every agent influences the hub and itself, and nobody else. The default is this known graph. The
authors' own runs learn it, in spite of a comment in their code: --graph learned, without an encoder as theirs.
Settings that the paper leaves open are those of the authors' code of July 2026.

    python experiments/spread.py --algorithm ippo --credit dg --env-id star-spread-5
    python experiments/spread.py --algorithm ippo --credit dg --graph learned
    python experiments/spread.py --algorithm mappo --credit global --env-id star-spread-20 --seed 2

Axes are (T, E, N, ...): time step, environment, agent. A pair is (..., i, j): i is the influencer, j the influenced.
B: all steps in one row; D: observation size; A: actions; Z: latent size, which is D without an encoder.
"""

import contextlib
import csv
import io
import os
import re
import signal
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal, NamedTuple

from errors import one_sentence

with one_sentence():
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
    """an agent learns from the rewards it can have influenced by the graph, from its own, or from the team's"""
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

    hidden_dim: int = 64
    """units of each hidden layer of policy and critic"""
    learning_rate: float = 5e-4
    """learning rate of every Adam"""
    adam_eps: float = 1e-5
    """epsilon of every Adam (the authors have PyTorch's 1e-8)"""
    gamma: float = 0.99
    """discount factor"""
    gae_lambda: float = 0.95
    """lambda of the generalized advantage estimation"""
    update_epochs: int = 4
    """gradient steps per iteration, each on the whole batch"""
    norm_reward: bool = True
    """standardise the rewards that agents learn from, on one scale for all; evaluations report the raw ones"""
    norm_adv: bool = True
    """normalise the advantages"""
    clip_coef: float = 0.2
    """PPO's clipping coefficient"""
    ent_coef: float = 0.01
    """coefficient of the entropy bonus"""
    max_grad_norm: float = 10.0
    """largest norm of the policy's and of the critic's gradient"""

    advantage: Literal["published", "pairwise"] = "published"
    """--credit dg: published: the paper's, pairwise: values of pairs from the meeting on"""
    c: float = 0.9
    """--graph learned: entropy-ratio threshold of an edge, 0: no edges, 1: most"""
    graph: Literal["known", "learned"] = "known"
    """--credit dg: the true graph, or the paper's, learned on raw observations (time and memory grow with N^2)"""
    soft: bool = True
    """--advantage published: count the share 1 - gae_lambda of all TD errors at once; --no-soft: none"""


class UserError(Exception):
    """Ends the script with its one sentence on stderr and exit status 2."""


def check_args(args):
    """Raise UserError for the first setting that makes no sense."""
    counts = "total_timesteps num_envs eval_interval eval_episodes update_epochs hidden_dim num_threads"
    amounts = "seed checkpoint_interval learning_rate adam_eps clip_coef ent_coef max_grad_norm"
    fractions = "gamma gae_lambda c"
    for names, low, high in ((counts, 1, torch.inf), (amounts, 0, torch.inf), (fractions, 0, 1)):
        for name in names.split():
            if not low <= getattr(args, name) <= high:
                raise UserError(f"{name} must lie in [{low}, {high}], not {getattr(args, name)}")
    if args.credit != "dg" and (args.graph != "known" or args.advantage != "published"):
        raise UserError(f"--graph and --advantage are for --credit dg: --credit {args.credit} has no graph")
    has_effect = {
        "c": args.graph == "learned",
        "soft": args.credit == "dg" and args.advantage == "published",
    }
    for name, relevant in has_effect.items():
        if getattr(args, name) != getattr(Args, name) and not relevant:
            # a sweep over it would be one run, many times
            raise UserError(f"{name} has no effect with these --credit, --graph and --advantage")
    make_env(args.env_id, 1)
    if args.total_timesteps < (frames := args.num_envs * StarSpread.episode_length):
        raise UserError(f"total_timesteps is {args.total_timesteps}, below one iteration ({frames} frames)")


# ENVIRONMENT
class StarSpread:
    """E environments of N agents and N landmarks, evenly spaced on a circle of radius 0.7, stepped all at once.

    Hub (agent 0): minus the sum over landmarks of the distance to the nearest agent. Leaf: minus its distance to the
    nearest landmark. Each agent's reward has Gaussian noise of standard deviation `noise`. Episodes start uniformly in
    [-1, 1]^2, which nobody can leave, and are cut after 50 steps, which is no terminal state.
    """

    directions = np.array([[0, 0], [-1, 0], [1, 0], [0, -1], [0, 1]])  # stay, west, east, south, north
    episode_length = 50

    def __init__(self, num_agents, num_envs, seed=0, noise=1.0):
        self.N, self.E, self.noise = num_agents, num_envs, noise
        self.D, self.A = 4 * num_agents + 2, len(self.directions)
        # as in the authors' code, and so is the border: the paper says nothing of either
        self.step_size = 0.05 if num_agents > 30 else 0.1
        angle = 2 * np.pi * np.arange(num_agents) / num_agents
        self.landmarks = 0.7 * np.stack([np.cos(angle), np.sin(angle)], -1)  # (N, 2)
        self.np_random = np.random.default_rng(seed)

    def reset(self):
        """Start an episode in every environment -> observations (E, N, D)."""
        self.positions = self.np_random.uniform(-1, 1, (self.E, self.N, 2))
        return self.observe()

    def step(self, actions):
        """Move every agent: actions (E, N) of 0..4 -> observations (E, N, D) and rewards (E, N) after the move."""
        self.positions = np.clip(self.positions + self.step_size * self.directions[actions], -1, 1)
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
    """Rewards minus their mean, divided by their standard deviation, over all agents and all of training so far.

    One scale for all, as in the authors' DG: with one per agent the hub, whose rewards vary most, would count for
    less in a sum over agents. The batch (T, E, N) first updates mean and variance (Chan et al. 1983).
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.tensor(0.0, dtype=torch.double))
        self.register_buffer("var", torch.tensor(1.0, dtype=torch.double))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.double))

    def forward(self, rewards):
        batch = rewards.flatten().double()
        count, gap = self.count + len(batch), batch.mean() - self.mean
        squares = self.var * self.count + batch.var(correction=0) * len(batch)
        self.var = (squares + gap**2 * self.count * len(batch) / count) / count
        self.mean, self.count = self.mean + gap * len(batch) / count, count
        return ((rewards - self.mean) / self.var.sqrt().clamp(min=1e-8)).float()


# NETWORKS
class AgentNetwork(nn.Module):
    """Two hidden layers on [x, one-hot agent id], shared by all: x (..., N, in_dim) -> (..., N, out_dim).

    The first layer is W x + U[agent]: an x common to all agents, (..., 1, in_dim), need not be repeated.
    """

    def __init__(self, in_dim, num_agents, hidden_dim, out_dim):
        super().__init__()
        bound = (in_dim + num_agents) ** -0.5  # of U, as for a linear layer on [x, one-hot agent id]
        self.input = nn.Linear(in_dim, hidden_dim)
        self.agent_id = nn.Parameter(torch.empty(num_agents, hidden_dim).uniform_(-bound, bound))
        self.hidden = nn.Linear(hidden_dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, out_dim)

    def forward(self, x):
        x = torch.relu(self.input(x) + self.agent_id)
        x = torch.relu(self.hidden(x))
        return self.output(x)


class OwnCritic(AgentNetwork):
    """Decentralised critic: each agent's values from its own observation, (..., N, D) -> (..., N).

    With N outputs instead of one (--advantage pairwise): W[i, j], (..., N_i, N_j), j's later return as i sees it.
    """

    def forward(self, obs):
        return super().forward(obs).squeeze(-1)  # of size 1, if there is one value per agent


class StateCritic(AgentNetwork):
    """Centralised critic: the same from the state.

    The state is what the hub observes, all landmarks and positions (4 N): N padded observations would be 4 N^2 + 2 N.
    """

    def forward(self, obs):
        return super().forward(obs[..., :1, 2:]).squeeze(-1)


def make_networks(args, env):
    """Policy and critic for the environment."""
    actor = AgentNetwork(env.D, env.N, args.hidden_dim, env.A)
    num_values = env.N if args.advantage == "pairwise" else 1
    if args.algorithm == "mappo":
        return actor, StateCritic(env.D - 2, env.N, args.hidden_dim, num_values)
    return actor, OwnCritic(env.D, env.N, args.hidden_dim, num_values)


def gradient_step(optimizer, loss, name, max_grad_norm=torch.inf):
    """One step of the optimizer; UserError if the loss or its gradient is not finite."""
    optimizer.zero_grad()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], max_grad_norm)
    if not (loss.isfinite() and norm.isfinite()):
        raise UserError(f"{name} is {loss.item()} and the norm of its gradient {norm.item()}")
    optimizer.step()


# DEPENDENCE GRAPH
def mlp(*sizes):
    """Layers of the given sizes; each hidden one is Linear -> ReLU -> LayerNorm."""
    layers = [nn.Linear(sizes[0], sizes[1])]
    for n_in, n_out in zip(sizes[1:], sizes[2:]):
        layers += [nn.ReLU(), nn.LayerNorm(n_in), nn.Linear(n_in, n_out)]
    return nn.Sequential(*layers)


class ReverseModel(nn.Module):
    """q_psi(a^i | z^j, z'^j, z^i): logits of i's action, told from j's transition; z' is the next step's z.

    It is mlp(3 * Z, 256, 128, 128, A) on every pair of agents, the first layer split to save time.
    """

    def __init__(self, latent_dim, num_actions):
        super().__init__()
        self.input = nn.Linear(3 * latent_dim, 256)  # of [z^j, z'^j, z^i]
        self.head = nn.Sequential(nn.ReLU(), nn.LayerNorm(256), mlp(256, 128, 128, num_actions))

    def forward(self, z, z_next):
        """z and z_next (B, N, Z) -> (B, N_i, N_j, A)."""
        # the widest layer is computed once per agent and added per pair
        latent_dim = z.shape[-1]
        influenced_weight = self.input.weight[:, : 2 * latent_dim]
        influencer_weight = self.input.weight[:, 2 * latent_dim :]
        influenced = torch.cat([z, z_next], -1) @ influenced_weight.T  # (B, N_j, 256)
        influencer = z @ influencer_weight.T + self.input.bias  # (B, N_i, 256)
        # (B, N_i, 1, 256) + (B, 1, N_j, 256)
        return self.head(influencer.unsqueeze(-2) + influenced.unsqueeze(-3))


class GraphLogits(NamedTuple):
    """What the graph models predict of a^i."""

    single_reverse_model: torch.Tensor  # (B, N, A)
    action_predictor: torch.Tensor  # (B, N, A)
    reverse_model: torch.Tensor


class GraphModels(nn.Module):
    """The networks behind the learned graph.

    encoder               z = f(o), so that merely seeing another agent gives no edge
    single_reverse_model  q(a^i | z^i, z'^i): trains the encoder to keep what actions change; no other use
    action_predictor      q_phi(a^i | z^i)
    reverse_model         q_psi(a^i | z^j, z'^j, z^i) for all pairs (i, j), i = j included
    """

    def __init__(self, obs_dim, num_actions, encoder=True, bf16=False, latent_dim=64):
        super().__init__()
        self.bf16 = bf16
        if encoder:
            self.encoder = mlp(obs_dim, 64, 64, latent_dim)
        else:
            self.encoder = nn.Identity()
            latent_dim = obs_dim
        self.single_reverse_model = mlp(2 * latent_dim, 256, 128, 128, num_actions)
        self.action_predictor = mlp(latent_dim, 256, 128, 128, num_actions)
        self.reverse_model = ReverseModel(latent_dim, num_actions)

    def forward(self, obs, alive):
        """obs (T+1, E, N, D), alive (T, E) -> GraphLogits of the steps that took place."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bf16):
            latent = self.encoder(obs)  # (T+1, E, N, Z)
            z = latent[:-1][alive]  # (B, N, Z)
            z_next = latent[1:][alive]
            single = self.single_reverse_model(torch.cat([z, z_next], -1))
            # the two others do not train the encoder
            z = z.detach()
            z_next = z_next.detach()
            predictor = self.action_predictor(z)
            reverse = self.reverse_model(z, z_next)
        return GraphLogits(single.float(), predictor.float(), reverse.float())


def entropy(logits):
    """Entropy in nats of the distributions with these logits, (..., A) -> (...)."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def other_agents(graph):
    """The pairs (N_i, N_j) bool with i != j, where graph is any tensor (..., N_i, N_j)."""
    return ~torch.eye(graph.shape[-1], dtype=torch.bool, device=graph.device)


def learned_graph(predictor_logits, reverse_logits, c):
    """i -> j iff H(q_psi(a^i | z^j, z'^j, z^i)) < c H(q_phi(a^i | z^i)), or i = j; H: entropy in nats.

    That is: to know what became of j tells something about what i did. Logits (B, N, A) and
    (B, N_i, N_j, A) -> graph (B, N_i, N_j) bool and, to be logged, the entropies' means and their ratio,
    those of q_psi over the pairs i != j, which alone decide anything.
    """
    predictor_entropy = entropy(predictor_logits.detach())  # (B, N)
    reverse_entropy = entropy(reverse_logits.detach())  # (B, N_i, N_j)
    graph = reverse_entropy < c * predictor_entropy.unsqueeze(-1)
    graph.diagonal(dim1=-2, dim2=-1).fill_(True)
    reverse_mean = reverse_entropy[:, other_agents(graph)].mean()
    statistics = {
        "predictor_entropy": predictor_entropy.mean(),
        "reverse_entropy_others": reverse_mean,
        "entropy_ratio_others": reverse_mean / predictor_entropy.mean(),
    }
    return graph, statistics


def graph_statistics(graph, oracle):
    """Edges per agent besides itself, precision and recall against the oracle's edges; graphs (B, N, N)."""
    others = other_agents(graph)
    edges = (graph & others).sum()
    oracle_edges = (oracle & others).sum()
    correct = (graph & oracle & others).sum()
    return {
        "edges_per_agent": edges / graph[..., 0].numel(),
        "oracle_precision": correct / edges.clamp(min=1),
        "oracle_recall": correct / oracle_edges.clamp(min=1),
    }


def cross_entropy(logits, actions):
    """Mean cross-entropy of predicted actions; logits (..., A), actions (...)."""
    return nn.functional.cross_entropy(logits.flatten(0, -2), actions.flatten())


def accuracy(logits, actions):
    """Fraction of the actions that are the most likely ones; logits (..., A), actions (...)."""
    return (logits.argmax(-1) == actions).float().mean()


def update_graph_models(logits, actions, optimizer):
    """One step on the cross-entropy of each prediction of a^i; actions (B, N) -> losses and accuracies."""
    # the target of a pair (i, j) is a^i
    pair_actions = actions.unsqueeze(-1).expand(logits.reverse_model.shape[:-1])
    others = other_agents(pair_actions)
    single_loss = cross_entropy(logits.single_reverse_model, actions)
    predictor_loss = cross_entropy(logits.action_predictor, actions)
    reverse_loss = cross_entropy(logits.reverse_model, pair_actions)
    # one sum, one Adam: no two of the losses share a weight and Adam treats every weight by itself
    loss = single_loss + predictor_loss + reverse_loss
    names = "single_reverse_model_loss + action_predictor_loss + reverse_model_loss"
    gradient_step(optimizer, loss, names)
    return {
        "single_reverse_model_loss": single_loss.detach(),
        "single_reverse_model_accuracy": accuracy(logits.single_reverse_model, actions),
        "action_predictor_loss": predictor_loss.detach(),
        "action_predictor_accuracy": accuracy(logits.action_predictor, actions),
        "reverse_model_loss": reverse_loss.detach(),
        # i = j is easier
        "reverse_model_accuracy_others": accuracy(logits.reverse_model[:, others], pair_actions[:, others]),
    }


# ADVANTAGES
def gae(rewards, values, terminated, alive, gamma, gae_lambda):
    """Every agent's own generalized advantage estimate (Schulman et al. 2016) over whole, padded episodes.

    rewards (T, E, N), values (T+1, E, N), terminated and alive (T, E) bool -> (T, E, N), 0 in the padding.
    An episode that ends without `terminated` bootstraps from the value after its last step.
    """
    advantages = torch.zeros_like(rewards)
    last_advantage = torch.zeros_like(rewards[0])  # (E, N)
    for t in reversed(range(len(rewards))):
        next_values = values[t + 1].masked_fill(terminated[t].unsqueeze(-1), 0.0)
        delta = rewards[t] + gamma * next_values - values[t]
        last_advantage = last_advantage.masked_fill(terminated[t].unsqueeze(-1), 0.0)
        last_advantage = delta + gamma * gae_lambda * last_advantage
        last_advantage = last_advantage.masked_fill(~alive[t].unsqueeze(-1), 0.0)
        advantages[t] = last_advantage
    return advantages


def meeting_times(graph, alive):
    """First m >= t at which the effect of i's action at t can have reached j, along edges of t, t+1, ..., m.

        m_t[i, j] = t                                              if there is an edge i -> j at t
        m_t[i, j] = min over k with an edge i -> k of m_t+1[k, j]  otherwise (k = i: wait)

    graph (T, E, N, N) bool, alive (T, E) bool -> (T, E, N_i, N_j) float, inf if the episode ends before.
    """
    T, E, N, _ = graph.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    edges = (graph | eye) & alive[..., None, None]
    times = torch.empty(edges.shape, device=graph.device)
    next_times = torch.full((E, N, N), torch.inf, device=graph.device)  # m_t+1[k, j]
    for t in reversed(range(T)):
        next_times.diagonal(dim1=-2, dim2=-1).fill_(t)  # an edge i -> j, with k = j, gives t itself
        # (E, N_i, N_k, N_j)
        through_k = torch.where(edges[t].unsqueeze(-1), next_times.unsqueeze(-3), torch.inf)
        next_times = through_k.amin(-2)
        times[t] = next_times
    return times


def multi_agent_gae(rewards, values, terminated, alive, graph, gamma, gae_lambda, soft=True):
    """Advantage of agent i: every agent j's TD errors delta^j from the first meeting m = m_t[i, j] on.

        A^i_t = sum_j sum_{l >= t} (gamma lambda)^(l - t) w_l delta^j_l
        hard: w_l = [l >= m]      soft: w_l = lambda [l >= m] + 1 - lambda

    With agent j's own GAE^j_t = sum_{l >= t} (gamma lambda)^(l - t) delta^j_l this is

        hard: A^i_t = sum_j (gamma lambda)^(m - t) GAE^j_m, 0 for a j that is never met
        soft: A^i_t = lambda * hard + (1 - lambda) sum_j GAE^j_t

    Shapes as in gae and meeting_times -> (T, E, N).
    """
    own = gae(rewards, values, terminated, alive, gamma, gae_lambda)  # (T, E, N)
    meeting = meeting_times(graph, alive)  # (T, E, N_i, N_j)
    never = meeting.isinf()
    now = torch.arange(len(meeting), device=meeting.device).view(-1, 1, 1, 1)
    discount = (gamma * gae_lambda) ** (meeting - now)
    meeting_index = meeting.masked_fill(never, 0).long()  # 0 for never, which is masked below
    at_meeting = own.unsqueeze(2).expand(meeting.shape).gather(0, meeting_index)  # GAE^j_m
    hard = (discount * at_meeting).masked_fill(never, 0.0).sum(-1)
    if not soft:
        return hard
    return (1 - gae_lambda) * own.sum(-1, keepdim=True) + gae_lambda * hard


def pairwise_targets(rewards, pair_values, terminated, alive, graph, gamma, gae_lambda):
    """What j earns from the first meeting of i and j on, as a lambda-return: the target of a pair's value, W[i, j].

        C_t[i, j] = R^j_t                                          if i influences j at t, and always if i = j
        C_t[i, j] = gamma ((1 - lambda) W[k, j](s_t+1) + lambda C_t+1[k, j])                         otherwise

    R^j is agent j's own lambda-return; k is the agent that i influences at t which meets j first (ties: i itself,
    then the lowest index). With lambda = 1 this is the sum of gamma^(t' - t) r^j_t' over t' >= m_t[i, j].

    Shapes as in gae and meeting_times; pair_values (T+1, E, N, N) -> (T, E, N_i, N_j), 0 in the padding. An episode
    that ends without `terminated` bootstraps from the value after its last step.
    """
    T, _, N = rewards.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    graph = graph | eye
    own_values = pair_values.diagonal(dim1=-2, dim2=-1)  # (T+1, E, N), W[j, j]
    own_returns = gae(rewards, own_values, terminated, alive, gamma, gae_lambda) + own_values[:-1]  # R^j
    direct = own_returns.unsqueeze(-2).masked_fill(~(graph & alive[..., None, None]), 0.0)  # (T, E, N_i, N_j)

    via = first_to_meet(graph, meeting_times(graph, alive))  # (T, E, N_i, N_j), k
    later = (alive & ~terminated)[..., None, None] & ~graph  # where the second line holds and is not 0
    last_step = torch.cat([~alive[1:], torch.ones_like(alive[:1])])[..., None, None]
    next_values = pair_values[1:].gather(-2, via)  # W[k, j](s_t+1)
    bootstrapped = gamma * torch.where(last_step, 1.0, 1 - gae_lambda) * next_values
    targets = torch.where(later, bootstrapped, direct)
    discount = gamma * gae_lambda * (later & ~last_step)
    next_targets = torch.zeros_like(targets[0])  # C_t+1
    for t in reversed(range(T)):
        next_targets = targets[t].addcmul_(discount[t], next_targets.gather(-2, via[t]))
    return targets


def first_to_meet(graph, meeting):
    """The agent k that i influences at t with the smallest m_t+1[k, j]; ties: i itself, then the lowest index.

    graph (T, E, N, N) bool with ones on the diagonal, meeting (T, E, N, N) -> (T, E, N_i, N_j) int64.
    """
    T, _, N, _ = graph.shape
    eye = torch.eye(N, dtype=torch.bool, device=graph.device)
    next_meeting = torch.cat([meeting[1:], torch.full_like(meeting[:1], T)]).clamp(max=T)  # T for never
    # one minimum finds the time and the agent: rank 0 is i itself, rank k + 1 is k
    rank = torch.arange(1.0, N + 1, device=graph.device).masked_fill(eye, 0.0)  # (N_i, N_k)
    rank = rank.masked_fill(~graph, torch.inf)  # (T, E, N_i, N_k)
    first = ((N + 1) * next_meeting.unsqueeze(-3) + rank.unsqueeze(-1)).amin(-2) % (N + 1)
    itself = torch.arange(1.0, N + 1, device=graph.device).unsqueeze(-1)
    return torch.where(first == 0, itself, first).long() - 1


def credit(args, rewards, values, graph):
    """Every agent's advantage (T, E, N), and the critic's targets, shaped as its values.

        local, global: GAE of the rewards, which are each agent's own or the team's
        published:     multi_agent_gae
        pairwise:      sum_j (C[i, j] - W[i, j]), see pairwise_targets

    rewards (T, E, N), values (T+1, E, N), pairwise (T+1, E, N_i, N_j), graph (T, E, N_i, N_j).
    """
    alive = torch.ones(rewards.shape[:2], dtype=torch.bool, device=rewards.device)  # (T, E): no episode ends before T,
    experience = (rewards, values, ~alive, alive)  # and none in a terminal state
    discounts = (args.gamma, args.gae_lambda)
    if args.advantage == "pairwise":
        targets = pairwise_targets(*experience, graph, *discounts)
        return (targets - values[:-1]).sum(-1), targets
    advantages = gae(*experience, *discounts)
    value_targets = advantages + values[:-1]  # they ignore the graph
    if args.credit == "dg":
        advantages = multi_agent_gae(*experience, graph, *discounts, args.soft)
    return advantages, value_targets


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
class Batch(NamedTuple):
    """What the policy and the critic learn from: the steps that took place."""

    obs: torch.Tensor  # (B, N, D)
    actions: torch.Tensor  # (B, N) int64
    logprobs: torch.Tensor  # (B, N), under the policy that collected them
    advantages: torch.Tensor  # (B, N)
    value_targets: torch.Tensor


def ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args):
    """update_epochs times a critic step, then a policy step, each on the whole batch (Schulman et al. 2017).

    Batch -> means over the epochs. UserError if a loss is not finite.
    """
    advantages = batch.advantages
    if args.norm_adv:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    history = defaultdict(list)
    for _ in range(args.update_epochs):
        value_loss = 0.5 * ((critic(batch.obs) - batch.value_targets) ** 2).mean()
        gradient_step(critic_optimizer, value_loss, "value_loss", args.max_grad_norm)

        all_logprobs = actor(batch.obs).log_softmax(-1)  # (B, N, A)
        mean_entropy = -(all_logprobs.exp() * all_logprobs).sum(-1).mean()
        logprobs = all_logprobs.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)  # (B, N)
        logratio = logprobs - batch.logprobs
        ratio = logratio.exp()
        clipped_ratio = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
        policy_loss = torch.max(-advantages * ratio, -advantages * clipped_ratio).mean()
        loss = policy_loss - args.ent_coef * mean_entropy
        gradient_step(actor_optimizer, loss, "policy_loss", args.max_grad_norm)

        history["value_loss"].append(value_loss.detach())
        history["policy_loss"].append(policy_loss.detach())
        history["entropy"].append(mean_entropy.detach())
        history["approx_kl"].append((ratio - 1 - logratio).mean().detach())
        history["clipfrac"].append(((ratio - 1).abs() > args.clip_coef).float().mean())
        history["ratio"].append(ratio.mean().detach())
    first_ratio = history.pop("ratio")[0]  # 1 up to rounding: nothing has changed yet
    means = {name: torch.stack(epochs).mean() for name, epochs in history.items()}
    return means | {"first_ratio": first_ratio}


def explained_variance(values, value_targets):
    """1 - Var(target - value) / Var(target): 1 for a perfect critic, 0 for one that gives the mean."""
    return 1 - (value_targets - values).var() / value_targets.var()


# EVALUATION
def evaluation_is_due(evaluations, global_step, args):
    """True at the start, when global_step has passed a multiple of eval_interval, and at the end."""
    if not evaluations:
        return True
    at_end = global_step >= args.total_timesteps and global_step > evaluations[-1]["global_step"]
    return at_end or global_step // args.eval_interval > evaluations[-1]["evaluation"]


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


def evaluation_row(agent_returns, global_step, args):
    """A row of evaluations.csv from the returns (episodes, N)."""
    team_returns = agent_returns.sum(-1)
    index = global_step // args.eval_interval
    at_end = global_step >= args.total_timesteps
    row = {
        "global_step": global_step,
        "evaluation": index,
        # when it was due
        "nominal_step": args.total_timesteps if at_end else index * args.eval_interval,
        "episodic_return": team_returns.mean().item(),
        "episodic_return_std": team_returns.std(correction=0).item(),
        "episodes": len(team_returns),
    }
    for i, mean in enumerate(agent_returns.mean(0).tolist()):
        row[f"episodic_return_agent_{i}"] = mean
    return row


# RUN FOLDER
@contextlib.contextmanager
def writing(path):
    """Turn a full disk, a folder that is gone or read-only, and the like into a UserError."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        raise UserError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def write_atomically(path, data):
    """Write bytes to a temporary file and rename it: whenever the process dies, path is whole, old or new."""
    temporary = path + ".tmp"
    with writing(path):
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.remove(temporary)
            raise


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


def log_scalars(writer, global_step, groups):
    """Write groups, as {"charts": {"SPS": 5000.0}}, to TensorBoard, as charts/SPS."""
    with writing(writer.log_dir):
        for group, metrics in groups.items():
            for name, value in metrics.items():
                writer.add_scalar(f"{group}/{name}", float(value), global_step)


def write_evaluations(run_dir, evaluations):
    """Write evaluations.csv, its numbers with six significant digits."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=evaluations[0].keys(), lineterminator="\n")
    table.writeheader()
    for row in evaluations:
        table.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    write_atomically(os.path.join(run_dir, "evaluations.csv"), text.getvalue().encode())


def log_evaluation(writer, run_dir, evaluations, row):
    """Append the row to the run's evaluations and write them to evaluations.csv and TensorBoard."""
    evaluations.append(row)
    write_evaluations(run_dir, evaluations)
    not_metrics = ("global_step", "evaluation", "nominal_step")
    metrics = {name: value for name, value in row.items() if name not in not_metrics}
    log_scalars(writer, row["global_step"], {"eval": metrics})


def main():
    # SET-UP
    script = os.path.basename(__file__)[: -len(".py")]
    args, checkpoint = parse_args(script)
    method = f"{args.exp_name}_{args.algorithm}_{args.credit}"
    method += "_learned" if args.graph == "learned" else ""
    method += "_pairwise" if args.advantage == "pairwise" else ""
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
    standardise = RunningStandardisation().to(device)
    # (T, E, N_i, N_j)
    true_graph = known_graph(env.N).to(device).expand(env.episode_length, env.E, env.N, env.N)
    adam = {"lr": args.learning_rate, "eps": args.adam_eps, "fused": True}
    actor_optimizer = torch.optim.Adam(actor.parameters(), **adam)
    critic_optimizer = torch.optim.Adam(critic.parameters(), **adam)
    trained = {"actor": actor, "critic": critic, "standardise": standardise}
    trained |= {"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer}
    if args.graph == "learned":
        graph_models = GraphModels(env.D, env.A, encoder=False).to(device)  # a leaf's observation ends with zeros
        models_optimizer = torch.optim.Adam(graph_models.parameters(), **adam)
        trained |= {"models": graph_models, "models_optimizer": models_optimizer}
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
        if not stop_signals and evaluation_is_due(evaluations, global_step, args):
            index = global_step // args.eval_interval
            agent_returns = evaluate(actor, args, index, device)  # (episodes, N)
            row = evaluation_row(agent_returns, global_step, args)
            log_evaluation(writer, run_dir, evaluations, row)

        # SAVE
        finished = global_step >= args.total_timesteps
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

        # DEPENDENCE GRAPH, by models trained up to the iteration before
        graph, graph_charts = true_graph, {}
        if args.graph == "learned":
            alive = torch.ones(rewards.shape[:2], dtype=torch.bool, device=device)
            graph_logits = graph_models(obs, alive)  # for the graph and, below, for the losses
            steps_graph, graph_charts = learned_graph(graph_logits.action_predictor, graph_logits.reverse_model, args.c)
            graph_charts |= graph_statistics(steps_graph, true_graph.flatten(0, 1))  # the oracle is the true graph
            graph = steps_graph.view_as(true_graph)

        # ADVANTAGES
        with torch.no_grad():
            values = critic(obs)  # (T+1, E, N), pairwise: (T+1, E, N_i, N_j)
        advantages, value_targets = credit(args, rewards, values, graph)  # (T, E, N), as the values

        # UPDATE POLICY AND CRITIC, THEN THE GRAPH MODELS
        batch = Batch(
            obs=obs[:-1].flatten(0, 1),
            actions=actions.flatten(0, 1),
            logprobs=logprobs.flatten(0, 1),
            advantages=advantages.flatten(0, 1),
            value_targets=value_targets.flatten(0, 1),
        )
        try:
            losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args)
            if args.graph == "learned":
                losses |= update_graph_models(graph_logits, batch.actions, models_optimizer)
        except UserError as error:
            bar.close()
            last = f"the last checkpoint is of frame {saved_step}" if saved_step >= 0 else "there is no checkpoint"
            raise UserError(f"iteration {iteration}: {error}; {last}") from error

        # LOG
        losses["explained_variance"] = explained_variance(values[:-1], value_targets)
        episodes = raw_rewards.sum(0).mean(0)  # (N), mean return of each agent
        charts = {"episodic_return": episodes.sum(), "hub_return": episodes[0], "leaf_return": episodes[1:].mean()}
        charts |= {"learning_rate": args.learning_rate, "SPS": (global_step - start_step) / (time.time() - start_time)}
        log_scalars(writer, global_step, {"charts": charts, "losses": losses, "graph": graph_charts})
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
