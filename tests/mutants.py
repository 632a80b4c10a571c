"""Hand-made faults ("mutants") of the LBF scripts, and a runner that shows that the tests find every one of them.

    python tests/mutants.py                  # all of them, about an hour on one core
    python tests/mutants.py gae clip         # those whose name has one of the words
    python tests/mutants.py --jobs 4

Each mutant replaces a piece of text that occurs once in each of its scripts by another one. In a temporary copy of the
repository the runner makes that change in all of them, runs the test that is named as the mutant's killer and looks
whether it fails for each of the scripts. Where it does not, the mutant has survived: the exit status is 1, and a test
is missing or looks away.

What several scripts share is identical (test_variants_in_sync.py), so a function whose test loads one script alone is
mutated in that one. CI does not run this, it is too slow; test_mutants.py checks that every text is still found. To
update the table after a change of the scripts, edit `old` and `new`; a mutant that has lost its meaning is removed.
A new test that some fault went unnoticed without is a reason for a new line here.
"""

import argparse
import ast
import os
import queue
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
DG = ["mappo_dg_lbf.py", "ippo_dg_lbf.py"]
LOCAL = ["baselines/mappo_local_lbf.py", "baselines/ippo_local_lbf.py"]
GLOBAL = ["baselines/mappo_global_lbf.py", "baselines/ippo_global_lbf.py"]
ALL = DG + LOCAL + GLOBAL
MAPPO = ["mappo_dg_lbf.py", "baselines/mappo_local_lbf.py", "baselines/mappo_global_lbf.py"]
IPPO = ["ippo_dg_lbf.py", "baselines/ippo_local_lbf.py", "baselines/ippo_global_lbf.py"]
ONE = ["mappo_dg_lbf.py"]  # whose tests load this script alone
STARTED = ["mappo_dg_lbf.py", "baselines/ippo_local_lbf.py"]  # whose tests start processes, of these scripts alone

ADVANTAGES = "test_advantages.py::test_"
ENVIRONMENT = "test_lbf_environment.py::test_"
INPUT = "test_lbf_bad_input.py::test_"
LEARNING = "test_lbf_learning.py::test_"
MAIN = "test_lbf_main.py::test_"
RESUME = "test_lbf_resume.py::test_"
RUNS = "test_lbf_runs.py::test_"


class Mutant(NamedTuple):
    """A fault of each of the scripts: old, which is there once, becomes new; the killer is FILE::TEST."""

    scripts: list[str]
    name: str
    killer: str
    old: str
    new: str


# fmt: off
MUTANTS = [
    # ARGS
    Mutant(ALL, "another lambda", RUNS + "the_default_task",
           "gae_lambda: float = 0.95",
           "gae_lambda: float = 0.9"),
    Mutant(DG, "another c", RUNS + "the_default_task",
           "c: float = 0.9",
           "c: float = 0.8"),
    Mutant(ALL, "half an iteration is enough", INPUT + "less_than_one_iteration",
           "args.num_envs * make_env",
           "args.num_envs // 2 * make_env"),
    # ENVIRONMENT
    Mutant(ONE, "ties go to the last loader", ENVIRONMENT + "winner_take_all",
           "winner, whole = max(loaders,",
           "winner, whole = max(loaders[::-1],"),
    Mutant(ONE, "the losers are paid, too", ENVIRONMENT + "winner_take_all",
           "whole if player is winner else 0",
           "whole if player is winner else player.reward"),
    Mutant(ONE, "food levels of three players", ENVIRONMENT + "winner_take_all_food_levels",
           "for player in self.players)[:2]))",
           "for player in self.players)[:3]))"),
    Mutant(ONE, "loading is always possible", ENVIRONMENT + "bit_equal_to_the_package",
           "can.append(bool(foods.keys() & beside))",
           "can.append(True)"),
    Mutant(ONE, "players in the order of their indices", ENVIRONMENT + "bit_equal_to_the_package",
           "(players[i], *players[:i], *players[i + 1 :])",
           "players"),
    Mutant(ONE, "the board is not seeded", ENVIRONMENT + "the_board_of_a_fresh_environment_depends_on_its_seed_alone",
           "env.seed(int(seed))",
           "env.seed(None)"),
    # NETWORKS
    Mutant(ALL, "no agent id", LEARNING + "agent_network_sees_a_one_hot_id",
           "self.input(x) + self.agent_id.weight)",
           "self.input(x) + 0 * self.agent_id.weight)"),
    Mutant(ALL, "one hidden layer less", LEARNING + "agent_network_sees_a_one_hot_id",
           "self.output(torch.relu(self.hidden(x)))",
           "self.output(x)"),
    Mutant(MAPPO, "MAPPO's critic sees the first agent", LEARNING + "what_the_critic_sees",
           "obs.flatten(-2).unsqueeze(-2)",
           "obs[..., :1, :].expand_as(obs).flatten(-2).unsqueeze(-2)"),
    Mutant(IPPO, "IPPO's critic sees everybody", LEARNING + "what_the_critic_sees",
           "super().forward(obs).squeeze(-1)",
           "super().forward(obs + obs.mean(-2, keepdim=True)).squeeze(-1)"),
    # DEPENDENCE GRAPH
    Mutant(ONE, "no LayerNorm", LEARNING + "hidden_layers_of_the_graph_models",
           "[nn.ReLU(), nn.LayerNorm(n_in), nn.Linear(n_in, n_out)]",
           "[nn.ReLU(), nn.Linear(n_in, n_out)]"),
    Mutant(ONE, "influencer and influenced exchanged in q_psi",
           LEARNING + "reverse_model_is_one_linear_layer_on_three_vectors",
           "self.influencer(z).unsqueeze(-2) + influenced.unsqueeze(-3)",
           "self.influencer(z).unsqueeze(-3) + influenced.unsqueeze(-2)"),
    Mutant(ONE, "q_psi does not see what became of j", LEARNING + "reverse_model_is_one_linear_layer_on_three_vectors",
           "torch.cat([z, z_next], -1))  # (B, N_j, 256)",
           "torch.cat([z, z], -1))  # (B, N_j, 256)"),
    Mutant(ONE, "every model trains the encoder", LEARNING + "only_the_single_agent_reverse_model_trains_the_encoder",
           "z, z_next = z.detach(), z_next.detach()",
           "pass"),
    Mutant(DG, "the next latent is the present one", LEARNING + "the_graph_is_learned_the_right_way_round",
           "latent[:-1][alive], latent[1:][alive]",
           "latent[:-1][alive], latent[:-1][alive]"),
    Mutant(ONE, "entropy of the influenced", LEARNING + "the_edge_rule",
           "c * predictor_entropy.unsqueeze(-1)",
           "c * predictor_entropy.unsqueeze(-2)"),
    Mutant(ONE, "a larger c gives fewer edges", LEARNING + "the_edge_rule",
           "graph = reverse_entropy < c * predictor",
           "graph = reverse_entropy > c * predictor"),
    Mutant(ONE, "the learned graph lacks its diagonal", LEARNING + "row_is_the_influencer",
           "    graph.diagonal(dim1=-2, dim2=-1).fill_(True)\n    means =",
           "    means ="),
    Mutant(ONE, "the oracle keeps two", LEARNING + "oracle_graph",
           "max_distance, nearest=3)",
           "max_distance, nearest=2)"),
    Mutant(ONE, "the oracle's ranks the other way round", LEARNING + "oracle_edges_start_at_the_one_who_looks",
           "argsort(dim=-1, stable=True).argsort(dim=-1)",
           "argsort(dim=-2, stable=True).argsort(dim=-2)"),
    Mutant(ONE, "drop keeps", LEARNING + "change_edges",
           "torch.where(graph, noise >= drop",
           "torch.where(graph, noise < drop"),
    Mutant(ONE, "precision and recall exchanged", LEARNING + "graph_statistics",
           "correct / edges.clamp(min=1), correct / true_edges.clamp(min=1)",
           "correct / true_edges.clamp(min=1), correct / edges.clamp(min=1)"),
    Mutant(ONE, "a pair predicts the action of j", LEARNING + "update_graph_models_means_cross_entropies",
           "actions.unsqueeze(-1).expand(logits[2]",
           "actions.unsqueeze(-2).expand(logits[2]"),
    Mutant(DG, "the models' gradient is clipped", LEARNING + "the_gradient_of_the_graph_models_is_not_clipped",
           "names))\n    return metrics",
           "names), 10.0)\n    return metrics"),
    # ADVANTAGES
    Mutant(ONE, "gae bootstraps behind a terminal state", ADVANTAGES + "gae_is_the_textbook_sum",
           "next_values = values[1:].masked_fill(terminated, 0.0)",
           "next_values = values[1:]"),
    Mutant(ONE, "gae does not bootstrap a truncated episode", ADVANTAGES + "gae_is_the_textbook_sum",
           "values[1:].masked_fill(terminated, 0.0)",
           "values[1:].masked_fill(terminated, 0.0) * torch.cat([alive[1:], 0 * alive[:1]])"),
    Mutant(ONE, "gae without lambda", ADVANTAGES + "gae_is_the_textbook_sum",
           "discounts = gamma * gae_lambda *",
           "discounts = gamma *"),
    Mutant(ONE, "gae reads the padding", ADVANTAGES + "padding_is_exactly_zero_and_never_read",
           "- values[:-1]).masked_fill(~alive, 0.0)",
           "- values[:-1])"),
    Mutant(ONE, "masks of numbers", ADVANTAGES + "masks_may_be_numbers",
           "alive.bool().unsqueeze(-1), terminated.bool().unsqueeze(-1)",
           "alive.unsqueeze(-1), terminated.unsqueeze(-1)"),
    Mutant(ONE, "meeting times follow the transposed graph", ADVANTAGES + "orientation",
           "edges = (graph.bool() | eye)",
           "edges = (graph.bool().transpose(-1, -2) | eye)"),
    Mutant(ONE, "paths compose backwards", ADVANTAGES + "meeting_times_are_first_reachability",
           "(penalty[t] + following.unsqueeze(-3)).amin(-2)",
           "(penalty[t].transpose(-2, -3) + following.unsqueeze(-1)).amin(-3)"),
    Mutant(ONE, "an edge counts one step late", ADVANTAGES + "an_edge_counts_from_its_own_step",
           ".fill_(t)  # via",
           ".fill_(t + 1)  # via"),
    Mutant(ONE, "paths across the end of an episode", ADVANTAGES + "meeting_times_are_first_reachability",
           "| eye) & alive.bool()[..., None, None]",
           "| eye)"),
    Mutant(ONE, "a late meeting is not discounted", ADVANTAGES + "multi_agent_gae_is_the_double_sum",
           "** delay * at_meeting",
           "** (0 * delay) * at_meeting"),
    Mutant(ONE, "soft and hard exchanged", ADVANTAGES + "limits_of_the_graph",
           "+ gae_lambda * hard if soft else hard",
           "+ gae_lambda * hard if not soft else hard"),
    # ROLLOUT
    Mutant(ONE, "greedy exploration", LEARNING + "actions_follow_the_policy",
           "(policy - (0.0 if greedy else",
           "(policy - (0.0 if True else"),
    Mutant(ALL, "greedy is ignored", RUNS + "eval_greedy",
           "(policy - (0.0 if greedy else",
           "(policy - (0.0 if False else"),
    Mutant(ONE, "Gumbel noise with the wrong sign", LEARNING + "actions_follow_the_policy",
           "(policy - (0.0 if greedy",
           "(policy + (0.0 if greedy"),
    Mutant(ALL, "log-probabilities of the greedy action", LEARNING + "collected_episodes",
           "logprobs[t] = policy.gather(-1, actions[t].unsqueeze(-1)).squeeze(-1)",
           "logprobs[t] = policy.amax(-1)"),
    Mutant(ALL, "the last step is not alive", LEARNING + "collected_episodes",
           "alive[t, e] = True",
           "alive[t, e] = not terminated[t, e]"),
    # PPO UPDATE
    Mutant(ALL, "gradients add up", LEARNING + "the_second_step_forgets_the_first_gradient",
           "optimizer.zero_grad()",
           "pass"),
    Mutant(ALL, "a bad gradient goes unnoticed", INPUT + "a_gradient_that_is_not_finite",
           "if not (loss.isfinite() and norm.isfinite())",
           "if not loss.isfinite()"),
    Mutant(ALL, "the critic's gradient is not clipped", LEARNING + "the_gradients_of_policy_and_critic_are_clipped",
           'value_loss, "value_loss", args.max_grad_norm',
           'value_loss, "value_loss"'),
    Mutant(ALL, "the policy's gradient is not clipped", LEARNING + "the_gradients_of_policy_and_critic_are_clipped",
           '"policy_loss", args.max_grad_norm',
           '"policy_loss"'),
    Mutant(ALL, "the whole squared error", LEARNING + "ppo_losses",
           "value_loss = 0.5 * (",
           "value_loss = ("),
    Mutant(ALL, "the clip is optimistic", LEARNING + "ppo_losses",
           "torch.max(-advantages * ratio",
           "torch.min(-advantages * ratio"),
    Mutant(ALL, "the clip is one-sided", LEARNING + "ppo_losses",
           "ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)",
           "ratio.clamp(1 - args.clip_coef)"),
    Mutant(ALL, "entropy is punished", LEARNING + "the_entropy_bonus_raises_the_entropy",
           "policy_loss - args.ent_coef * entropy",
           "policy_loss + args.ent_coef * entropy"),
    Mutant(ALL, "another estimate of the divergence", LEARNING + "ppo_losses",
           "(ratio - 1 - logratio).mean()",
           "(-logratio).mean()"),
    Mutant(ALL, "the last ratio is logged as the first", LEARNING + "first_ratio_is_one",
           '"first_ratio": history[0][-1]',
           '"first_ratio": history[-1][-1]'),
    Mutant(ALL, "the losses of the last epoch are logged", LEARNING + "metrics_are_means_over_the_epochs",
           "torch.stack(history).mean(0)",
           "torch.stack(history)[-1]"),
    Mutant(ALL, "advantages are always normalised", LEARNING + "ppo_losses",
           "+ 1e-8) if args.norm_adv else advantages",
           "+ 1e-8)"),
    # EVALUATION
    Mutant(ALL, "evaluation without winner-take-all", MAIN + "training_and_evaluation_play_the_same_game",
           "envs = [make_env(args.env_id, args.winner_take_all, seed) for seed in seeds]\n    with",
           "envs = [make_env(args.env_id, False, seed) for seed in seeds]\n    with"),
    Mutant(ALL, "all evaluations on the same boards", RUNS + "evaluation_boards",
           "SeedSequence([args.seed, index])",
           "SeedSequence([args.seed, 1])"),
    Mutant(ALL, "evaluations do not depend on the seed", RUNS + "evaluation_boards",
           "SeedSequence([args.seed, index])",
           "SeedSequence([7, index])"),
    Mutant(ALL, "evaluation draws from the training's stream", RUNS + "evaluation_boards",
           "with torch.random.fork_rng(devices=[]):",
           "if True:"),
    # CHECKPOINTS
    Mutant(ALL, "the file is not synced", RESUME + "write_atomically_syncs_before_it_renames",
           "os.fsync(file.fileno())",
           "pass"),
    Mutant(ALL, "the file is written in place", RESUME + "write_atomically_leaves_the_old_file",
           'with open(path + ".tmp", "wb")',
           'with open(path, "wb")'),
    Mutant(ALL, "another script's checkpoint is taken", INPUT + "resume_from_another_script",
           "if writer != script or saved.keys()",
           "if saved.keys()"),
    Mutant(ONE, "settings of a resume are not compared", INPUT + "resume_with_other_settings",
           "if getattr(args, name) != saved[name] and",
           "if False and"),
    Mutant(ALL, "the checkpoint interval may not change", INPUT + "resume_with_settings_that_do_not_touch_the_numbers",
           "save_model checkpoint_interval num_workers",
           "save_model num_workers"),
    # SET-UP
    Mutant(ALL, "determinism is a dead flag", MAIN + "the_determinism_flag_and_the_threads_reach_pytorch",
           "torch.use_deterministic_algorithms(args.torch_deterministic)",
           "torch.use_deterministic_algorithms(True)"),
    Mutant(ALL, "threads are a dead flag", MAIN + "the_determinism_flag_and_the_threads_reach_pytorch",
           "torch.set_num_threads(args.num_threads)",
           "torch.set_num_threads(1)"),
    Mutant(ALL, "PyTorch is not seeded", RESUME + "same_seed_same_run",
           "torch.manual_seed(args.seed)  #",
           "#"),
    Mutant(ALL, "the same boards in every environment",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "envs = [make_env(args.env_id, args.winner_take_all, seed) for seed in seeds]\n    N,",
           "envs = [make_env(args.env_id, args.winner_take_all, seeds[0]) for seed in seeds]\n    N,"),
    Mutant(ALL, "training boards do not depend on the seed",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "np.random.SeedSequence(args.seed)",
           "np.random.SeedSequence(1)"),
    Mutant(ALL, "the critic's width is fixed", MAIN + "hidden_dim_is_the_width_of_policy_and_critic",
           "N, args.hidden_dim, 1)",
           "N, 128, 1)"),
    Mutant(ALL, "the settings are not logged", MAIN + "the_settings_are_logged",
           'writer.add_text("hyperparameters", ',
           'len('),
    Mutant(ALL, "another eps", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_spec",
           '"eps": 1e-5',
           '"eps": 1e-8'),
    Mutant(ALL, "a fixed learning rate", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_spec",
           '"lr": args.learning_rate',
           '"lr": 5e-4'),
    Mutant(DG, "a fixed learning rate of the models", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_spec",
           "torch.optim.Adam(models.parameters(), **adam)",
           'torch.optim.Adam(models.parameters(), **adam | {"lr": 5e-4})'),
    Mutant(ALL, "another eps of the critic", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_spec",
           "torch.optim.Adam(critic.parameters(), **adam)",
           'torch.optim.Adam(critic.parameters(), **adam | {"eps": 1e-8})'),
    Mutant(ALL, "the critic's moments are not saved", RESUME + "a_checkpoint_is_complete",
           ', "critic_optimizer": critic_optimizer}',
           "}"),
    Mutant(ALL, "the boards' generators are not restored", RESUME + "resume_is_exact",
           "env.np_random.bit_generator.state = random_state",
           "pass"),
    Mutant(ALL, "the players' cells are not restored", RESUME + "resume_is_exact",
           "player.position = position  #",
           "pass  #"),
    Mutant(ALL, "PyTorch's generator is not restored", RESUME + "resume_is_exact",
           'torch.set_rng_state(checkpoint["torch_rng"])',
           "pass"),
    Mutant(ALL, "a run folder is overwritten", INPUT + "a_run_folder_is_never_overwritten",
           "exist_ok=bool(checkpoint)",
           "exist_ok=True"),
    Mutant(STARTED, "the curves of the killed process stay", RESUME + "sigkill_and_resume",
           "purge_step=global_step + 1 if checkpoint else None",
           "purge_step=None"),
    # EVALUATE
    Mutant(ALL, "no closing evaluation", RUNS + "a_script_alone_in_an_empty_folder",
           "or finished and global_step > last)",
           ")"),
    Mutant(ALL, "every evaluation has the index 0",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "evaluate(actor, args, global_step // every, device)",
           "evaluate(actor, args, 0, device)"),
    Mutant(ALL, "the deviation of a sample", MAIN + "evaluations_are_logged_as_they_were_played",
           "team.std(correction=0)",
           "team.std()"),
    Mutant(ALL, "the team's return is the mean", MAIN + "evaluations_are_logged_as_they_were_played",
           "team, agents = returns.sum(-1)",
           "team, agents = returns.mean(-1)"),
    # SAVE
    Mutant(ALL, "every iteration is saved", MAIN + "checkpoints_are_written_when_they_are_due",
           "global_step // every > saved_step // every)",
           "global_step > saved_step)"),
    Mutant(ALL, "the end is not saved", MAIN + "checkpoints_are_written_when_they_are_due",
           "due = every and (finished or",
           "due = every and ("),
    Mutant(ALL, "--save-model is dead", RUNS + "exp_name_names_the_folder",
           "or finished and args.save_model",
           ""),
    Mutant(ALL, "a checkpoint of the iteration before", RESUME + "a_checkpoint_is_complete",
           '"iteration": iteration}',
           '"iteration": iteration - 1}'),
    Mutant(STARTED, "no checkpoint at a stop signal", RESUME + "stop_signals",
           "if due or stop_signals or finished",
           "if due or finished"),
    # COLLECT
    Mutant(ALL, "frames of the padding count", MAIN + "training_episodes_are_logged_as_they_were_played",
           "global_step += int(alive.sum())",
           "global_step += alive.numel()"),
    # DEPENDENCE GRAPH, in main
    Mutant(DG, "the oracle looks before the step", MAIN + "the_oracle_looks_at_the_positions_after_the_step",
           "player.history[1:]",
           "player.history[:-1]"),
    Mutant(DG, "the oracle's distance is a dead flag", MAIN + "the_oracle_looks_at_the_positions_after_the_step",
           "oracle_graph(positions, args.oracle_distance)",
           "oracle_graph(positions, 3)"),
    Mutant(DG, "--transpose-graph is ignored", RUNS + "transpose_graph",
           "if args.transpose_graph else graph",
           "if False else graph"),
    Mutant(DG, "the graph is always transposed", RUNS + "transpose_graph",
           "graph.transpose(-1, -2) if args.transpose_graph else graph",
           "graph.transpose(-1, -2)"),
    Mutant(DG, "a complete graph is random", RUNS + "graph_options",
           '"complete": 1.0',
           '"complete": args.graph_p'),
    # ADVANTAGES, in main
    Mutant(DG, "the critic's target is DG's", MAIN + "what_the_update_learns_from",
           "+ values[:-1]  # the critic's target ignores the graph\n"
           "        advantages = multi_agent_gae(*experience, graph, args.gamma, args.gae_lambda, "
           "args.soft)",
           "\n"
           "        advantages = multi_agent_gae(*experience, graph, args.gamma, args.gae_lambda, "
           "args.soft)\n"
           "        returns = advantages + values[:-1]"),
    Mutant(DG, "--no-soft is dead", RUNS + "soft_weights_and_the_limits_of_the_graph",
           "args.gae_lambda, args.soft)",
           "args.gae_lambda)"),
    Mutant(LOCAL, "local rewards are shared", MAIN + "what_the_update_learns_from",
           "advantages = gae(rewards,",
           "advantages = gae(rewards.mean(-1, keepdim=True).expand_as(rewards),"),
    Mutant(GLOBAL, "global rewards are the mean", MAIN + "what_the_update_learns_from",
           "rewards.sum(-1, keepdim=True)",
           "rewards.mean(-1, keepdim=True)"),
    # UPDATE POLICY AND CRITIC
    Mutant(ALL, "padding is learned from", LEARNING + "padding_never_changes_a_loss",
           "batch = [x[alive] for x in",
           "batch = [x.flatten(0, 1) for x in"),
    Mutant(DG, "the models learn before the graph is read",
           RUNS + "the_graph_comes_from_models_trained_up_to_the_iteration_before",
           "            graph[alive], entropies = learned_graph(",
           "            update_graph_models(logits, actions[alive], models_optimizer)\n"
           "            logits = models(obs, alive)\n"
           "            graph[alive], entropies = learned_graph("),
    # LOG
    Mutant(ALL, "explained variance of the targets",
           MAIN + "explained_variance_is_that_of_the_values_before_the_update",
           "1 - (returns - values[:-1])[alive].var()",
           "1 - values[:-1][alive].var()"),
    Mutant(ALL, "explained variance with the padding",
           MAIN + "explained_variance_is_that_of_the_values_before_the_update",
           "(returns - values[:-1])[alive].var() / returns[alive].var()",
           "(returns - values[:-1]).var() / returns.var()"),
    Mutant(ALL, "frames per second from 0 after a resume",
           MAIN + "frames_per_second_count_from_the_start_of_the_process",
           "start_time, start_step = time.time(), global_step",
           "start_time, start_step = time.time(), 0"),
    Mutant(ALL, "an agent's return is the sum over environments",
           MAIN + "training_episodes_are_logged_as_they_were_played",
           "episodes = rewards.sum(0).mean(0)",
           "episodes = rewards.sum(0).sum(0)"),
    Mutant(STARTED, "status 0 after a stop signal", RESUME + "stop_signals",
           "sys.exit(128 + stop_signals[0] if stop_signals else 0)",
           "sys.exit(0)"),
]
# fmt: on


def mutate(text, mutant):
    """The script's text with the fault; ValueError if the text to replace is not there exactly once."""
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.name}: {mutant.old!r} occurs {text.count(mutant.old)} times")
    mutated = text.replace(mutant.old, mutant.new)
    ast.parse(mutated)
    return mutated


def copy_repository(folder):
    """A copy of what the tests need, without compiled files: those could outlive a change within one second."""
    left_out = shutil.ignore_patterns(".*", "runs", "__pycache__", "figures", "results", "wandb", "golden")
    return shutil.copytree(ROOT, Path(folder) / "repository", ignore=left_out)


def failing(repository, *tests):
    """Run the tests -> the names of those that fail, with their parameters; RuntimeError if they cannot be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider"]
    command += [f"tests/{test}" for test in tests]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    options = {"cwd": repository, "env": environment, "capture_output": True, "text": True}
    try:
        done = subprocess.run(command, **options, timeout=1800 * len(tests))
    except subprocess.TimeoutExpired:
        return list(tests)  # a fault that hangs is found, too
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{tests}: status {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return [line.split()[1] for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]


def survives_in(repository, mutant):
    """The scripts in which the killer does not find the mutant. The scripts are as they were afterwards."""
    originals = {script: (repository / script).read_text(encoding="utf-8") for script in mutant.scripts}

    def found_in(scripts):
        for script in scripts:
            (repository / script).write_text(mutate(originals[script], mutant), encoding="utf-8")
        try:
            return failing(repository, mutant.killer)
        finally:
            for script in scripts:
                (repository / script).write_text(originals[script], encoding="utf-8")

    # in all scripts at once; those that no failure names are then tried alone
    names = found_in(mutant.scripts)
    if len(mutant.scripts) == 1:
        return [] if names else mutant.scripts
    unnamed = [script for script in mutant.scripts if not any(script in name for name in names)]
    return [script for script in unnamed if not found_in([script])]


def try_all(chosen, repositories):
    """Print what becomes of each mutant -> the number of those that survive. Each copy of the repository is a job."""
    idle = queue.Queue()
    for repository in repositories:
        idle.put(repository)

    def try_one(mutant):
        repository = idle.get()
        try:
            return survives_in(repository, mutant)
        finally:
            idle.put(repository)

    if broken := failing(repositories[0], *sorted({mutant.killer for mutant in chosen})):
        raise SystemExit(f"these tests fail without any fault: {broken}")
    survivors = 0
    with ThreadPoolExecutor(len(repositories)) as pool:
        for mutant, scripts in zip(chosen, pool.map(try_one, chosen)):
            survivors += bool(scripts)
            fate = f"SURVIVES in {', '.join(scripts)}:" if scripts else "is killed by"
            print(f"{mutant.name}: {fate} {mutant.killer}", flush=True)
    print(f"{len(chosen)} mutants, {survivors} survive")
    return survivors


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="only the mutants whose name has one of these words")
    parser.add_argument("--jobs", type=int, default=1, help="how many to try at the same time")
    args = parser.parse_args()
    chosen = [mutant for mutant in MUTANTS if not args.words or any(word in mutant.name for word in args.words)]
    with tempfile.TemporaryDirectory() as folder:
        copies = [copy_repository(Path(folder) / str(job)) for job in range(args.jobs)]
        return 1 if try_all(chosen, copies) else 0


if __name__ == "__main__":
    sys.exit(main())
