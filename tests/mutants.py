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
TWO = ["mappo_dg_lbf.py", "baselines/mappo_local_lbf.py"]  # whose tests play runs of these scripts alone
SIBLINGS = ["ippo_dg_lbf.py", "baselines/ippo_local_lbf.py", "baselines/mappo_global_lbf.py"]  # to the others' settings

ADVANTAGES = "test_advantages.py::test_"
ENVIRONMENT = "test_lbf_environment.py::test_"
INPUT = "test_lbf_bad_input.py::test_"
LEARNING = "test_lbf_learning.py::test_"
MAIN = "test_lbf_main.py::test_"
FAULTS = "test_run_folder_faults.py::test_"
RESUME = "test_lbf_resume.py::test_"
RUN_FOLDER = "test_run_folder.py::test_"
RUNS = "test_lbf_runs.py::test_"
STOP = "a_stop_in_an_evaluation_or_a_collection_is_answered_there"


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
    Mutant(ONE, "whole numbers have no bound", FAULTS + "numbers_that_no_machine_takes",
           "high = min(high, 2**64 - 1)",
           "pass"),
    Mutant(ONE, "nan is in every range", INPUT + "fractions",
           "if not low <= value <= high:",
           "if value < low or value > high:"),
    # ENVIRONMENT
    Mutant(ONE, "ties go to the last loader", ENVIRONMENT + "winner_take_all",
           "winner = max(loaders,",
           "winner = max(loaders[::-1],"),
    Mutant(ONE, "the losers are paid, too", ENVIRONMENT + "winner_take_all",
           "whole if player is winner else 0",
           "whole if player is winner else player.reward"),
    Mutant(ONE, "food levels of three players", ENVIRONMENT + "winner_take_all_food_levels",
           "levels[0] + levels[1])",
           "sum(levels[:3]))"),
    Mutant(ONE, "loading is always possible", ENVIRONMENT + "bit_equal_to_the_package",
           "if any(cell in self.foods for cell in beside):",
           "if True:"),
    Mutant(ONE, "players in the order of their indices", ENVIRONMENT + "bit_equal_to_the_package",
           "(players[i], *players[:i], *players[i + 1 :])",
           "players"),
    Mutant(ONE, "the board is not seeded", ENVIRONMENT + "the_board_of_a_fresh_environment_depends_on_its_seed_alone",
           "env.seed(int(seed))",
           "env.seed(None)"),
    Mutant(ALL, "the boards' generators are not restored", RESUME + "resume_is_exact",
           "self.np_random.bit_generator.state = random_state",
           "pass"),
    Mutant(ALL, "the players' cells are not restored", RESUME + "resume_is_exact",
           "player.position = position",
           "pass"),
    Mutant(DG, "the oracle looks before the step", MAIN + "the_oracle_looks_at_the_positions_after_the_step",
           "cells[:, 1:]",
           "cells[:, :-1]"),
    # NETWORKS
    Mutant(ALL, "no agent id", LEARNING + "agent_network_sees_a_one_hot_id",
           "self.input(x) + self.agent_id)",
           "self.input(x) + 0 * self.agent_id)"),
    Mutant(ALL, "one hidden layer less", LEARNING + "agent_network_sees_a_one_hot_id",
           "x = torch.relu(self.hidden(x))",
           "pass"),
    Mutant(MAPPO, "MAPPO's critic sees the first agent", LEARNING + "what_the_critic_sees",
           "obs.flatten(-2).unsqueeze(-2)",
           "obs[..., :1, :].expand_as(obs).flatten(-2).unsqueeze(-2)"),
    Mutant(IPPO, "IPPO's critic sees everybody", LEARNING + "what_the_critic_sees",
           "super().forward(obs).squeeze(-1)",
           "super().forward(obs + obs.mean(-2, keepdim=True)).squeeze(-1)"),
    Mutant(ALL, "gradients add up", LEARNING + "the_second_step_forgets_the_first_gradient",
           "optimizer.zero_grad()",
           "pass"),
    Mutant(ALL, "a bad gradient goes unnoticed", INPUT + "a_gradient_that_is_not_finite",
           "if not (loss.isfinite() and norm.isfinite())",
           "if not loss.isfinite()"),
    # DEPENDENCE GRAPH
    Mutant(ONE, "no LayerNorm", LEARNING + "hidden_layers_of_the_graph_models",
           "[nn.ReLU(), nn.LayerNorm(n_in), nn.Linear(n_in, n_out)]",
           "[nn.ReLU(), nn.Linear(n_in, n_out)]"),
    Mutant(ONE, "influencer and influenced exchanged in q_psi",
           LEARNING + "reverse_model_is_one_linear_layer_on_three_vectors",
           "influencer.unsqueeze(-2) + influenced.unsqueeze(-3)",
           "influencer.unsqueeze(-3) + influenced.unsqueeze(-2)"),
    Mutant(ONE, "q_psi does not see what became of j", LEARNING + "reverse_model_is_one_linear_layer_on_three_vectors",
           "torch.cat([z, z_next], -1) @",
           "torch.cat([z, z], -1) @"),
    Mutant(ONE, "every model trains the encoder", LEARNING + "only_the_single_agent_reverse_model_trains_the_encoder",
           "z = z.detach()\n            z_next = z_next.detach()",
           "pass"),
    Mutant(DG, "the next latent is the present one", LEARNING + "the_graph_is_learned_the_right_way_round",
           "z_next = latent[1:][alive]",
           "z_next = latent[:-1][alive]"),
    Mutant(ONE, "entropy of the influenced", LEARNING + "the_edge_rule",
           "c * predictor_entropy.unsqueeze(-1)",
           "c * predictor_entropy.unsqueeze(-2)"),
    Mutant(ONE, "a larger c gives fewer edges", LEARNING + "the_edge_rule",
           "graph = reverse_entropy < c * predictor",
           "graph = reverse_entropy > c * predictor"),
    Mutant(ONE, "the learned graph lacks its diagonal", LEARNING + "row_is_the_influencer",
           "    graph.diagonal(dim1=-2, dim2=-1).fill_(True)\n    reverse_mean =",
           "    reverse_mean ="),
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
           '"oracle_precision": correct / edges.clamp(min=1),\n'
           '        "oracle_recall": correct / oracle_edges.clamp(min=1)',
           '"oracle_precision": correct / oracle_edges.clamp(min=1),\n'
           '        "oracle_recall": correct / edges.clamp(min=1)'),
    Mutant(ONE, "a pair predicts the action of j", LEARNING + "update_graph_models_means_cross_entropies",
           "actions.unsqueeze(-1).expand(logits.reverse_model",
           "actions.unsqueeze(-2).expand(logits.reverse_model"),
    Mutant(DG, "the models' gradient is clipped", LEARNING + "the_gradient_of_the_graph_models_is_not_clipped",
           "gradient_step(optimizer, loss, names)",
           "gradient_step(optimizer, loss, names, 10.0)"),
    Mutant(ONE, "the parts of q_psi's first weight exchanged",
           LEARNING + "reverse_model_is_one_linear_layer_on_three_vectors",
           "self.input.weight[:, : 2 * latent_dim]\n"
           "        influencer_weight = self.input.weight[:, 2 * latent_dim :]",
           "self.input.weight[:, latent_dim:]\n"
           "        influencer_weight = self.input.weight[:, :latent_dim]"),
    Mutant(ONE, "GraphLogits in another order", LEARNING + "only_the_single_agent_reverse_model_trains_the_encoder",
           "GraphLogits(single.float(), predictor.float(), reverse.float())",
           "GraphLogits(predictor.float(), single.float(), reverse.float())"),
    Mutant(DG, "the graph compares with the single-agent reverse model",
           LEARNING + "the_single_agent_reverse_model_has_no_part_in_the_graph",
           "predictor_logits = graph_logits.action_predictor",
           "predictor_logits = graph_logits.single_reverse_model"),
    Mutant(DG, "--transpose-graph is ignored", RUNS + "transpose_graph",
           "if args.transpose_graph:",
           "if False:"),
    Mutant(DG, "the graph is always transposed", RUNS + "transpose_graph",
           "if args.transpose_graph:",
           "if True:"),
    Mutant(ONE, "a complete graph is random", RUNS + "graph_options",
           "graph = torch.ones_like(oracle)",
           "graph = change_edges(identity, drop=0.0, add=args.graph_p)"),
    # ADVANTAGES
    Mutant(ONE, "gae bootstraps behind a terminal state", ADVANTAGES + "gae_is_the_textbook_sum",
           "next_values = values[t + 1].masked_fill(terminated[t].unsqueeze(-1), 0.0)",
           "next_values = values[t + 1]"),
    Mutant(ONE, "gae does not bootstrap a truncated episode", ADVANTAGES + "gae_is_the_textbook_sum",
           "next_values = values[t + 1].masked_fill(terminated[t].unsqueeze(-1), 0.0)",
           "next_values = values[t + 1] * alive[t + 1 : t + 2].any(0).unsqueeze(-1)"),
    Mutant(ONE, "gae without lambda", ADVANTAGES + "gae_is_the_textbook_sum",
           "delta + gamma * gae_lambda *",
           "delta + gamma *"),
    Mutant(ONE, "gae reads the padding", ADVANTAGES + "padding_is_exactly_zero_and_never_read",
           "last_advantage = last_advantage.masked_fill(~alive[t].unsqueeze(-1), 0.0)",
           "pass"),
    Mutant(ONE, "meeting times follow the transposed graph", ADVANTAGES + "orientation",
           "edges = (graph | eye)",
           "edges = (graph.transpose(-1, -2) | eye)"),
    Mutant(ONE, "paths compose backwards", ADVANTAGES + "meeting_times_are_first_reachability",
           "edges[t].unsqueeze(-1), next_times.unsqueeze(-3)",
           "edges[t].unsqueeze(-3), next_times.unsqueeze(-1)"),
    Mutant(ONE, "an edge counts one step late", ADVANTAGES + "an_edge_counts_from_its_own_step",
           ".fill_(t)  # an edge",
           ".fill_(t + 1)  # an edge"),
    Mutant(ONE, "paths across the end of an episode", ADVANTAGES + "meeting_times_are_first_reachability",
           "(graph | eye) & alive[..., None, None]",
           "graph | eye"),
    Mutant(ONE, "a late meeting is not discounted", ADVANTAGES + "multi_agent_gae_is_the_double_sum",
           "** (meeting - now)",
           "** (0 * (meeting - now))"),
    Mutant(ONE, "soft and hard exchanged", ADVANTAGES + "limits_of_the_graph",
           "if not soft:",
           "if soft:"),
    # ROLLOUT
    Mutant(ONE, "greedy exploration", LEARNING + "actions_follow_the_policy",
           "if greedy:",
           "if True:"),
    Mutant(ALL, "greedy is ignored", RUNS + "eval_greedy",
           "if greedy:",
           "if False:"),
    Mutant(ONE, "Gumbel noise with the wrong sign", LEARNING + "actions_follow_the_policy",
           "(all_logprobs - exponential.log())",
           "(all_logprobs + exponential.log())"),
    Mutant(ALL, "log-probabilities of the greedy action", LEARNING + "collected_episodes",
           "logprobs[t] = all_logprobs.gather(-1, actions[t].unsqueeze(-1)).squeeze(-1)",
           "logprobs[t] = all_logprobs.amax(-1)"),
    Mutant(ALL, "the last step is not alive", LEARNING + "collected_episodes",
           "alive[t, e] = True",
           "alive[t, e] = not terminated[t, e]"),
    Mutant(ALL, "an agent's return is the sum over environments",
           MAIN + "training_episodes_are_logged_as_they_were_played",
           "agent_returns = rollout.rewards.sum(0).mean(0)",
           "agent_returns = rollout.rewards.sum(0).sum(0)"),
    Mutant(ALL, "evaluation draws from the training's stream", RUNS + "evaluation_boards",
           "exponential_(generator=generator)",
           "exponential_()"),
    # PPO UPDATE
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
           "policy_loss - args.ent_coef * mean_entropy",
           "policy_loss + args.ent_coef * mean_entropy"),
    Mutant(ALL, "another estimate of the divergence", LEARNING + "ppo_losses",
           "(ratio - 1 - logratio).mean()",
           "(-logratio).mean()"),
    Mutant(ALL, "the last ratio is logged as the first", LEARNING + "first_ratio_is_one",
           'history.pop("ratio")[0]',
           'history.pop("ratio")[-1]'),
    Mutant(ALL, "the losses of the last epoch are logged", LEARNING + "metrics_are_means_over_the_epochs",
           "torch.stack(epochs).mean()",
           "epochs[-1]"),
    Mutant(ALL, "advantages are always normalised", LEARNING + "ppo_losses",
           "if args.norm_adv:",
           "if True:"),
    Mutant(ALL, "explained variance of the targets",
           MAIN + "explained_variance_is_that_of_the_values_before_the_update",
           "1 - (value_targets - values).var()",
           "1 - values.var()"),
    # EVALUATION
    Mutant(ALL, "evaluation without winner-take-all", MAIN + "training_and_evaluation_play_the_same_game",
           "make_env(args.env_id, args.winner_take_all, seed) for seed in seeds]",
           "make_env(args.env_id, False, seed) for seed in seeds]"),
    Mutant(ALL, "all evaluations on the same boards", RUNS + "evaluation_boards",
           "SeedSequence([args.seed, 1, index])",
           "SeedSequence([args.seed, 1, 1])"),
    Mutant(ALL, "evaluations do not depend on the seed", RUNS + "evaluation_boards",
           "SeedSequence([args.seed, 1, index])",
           "SeedSequence([7, 1, index])"),
    Mutant(ALL, "evaluation 0 plays the boards of training",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "SeedSequence([args.seed, 1, index])",
           "SeedSequence([args.seed, index])"),
    Mutant(ALL, "no closing evaluation", RUNS + "the_default_task",
           "return at_end or ",
           "return "),
    Mutant(ALL, "the closing evaluation counts as the one before", MAIN + "an_evaluation_says_when_it_was_due",
           "args.total_timesteps if at_end else index * args.eval_interval",
           "index * args.eval_interval"),
    Mutant(ALL, "the deviation of a sample", MAIN + "evaluations_are_logged_as_they_were_played",
           "team_returns.std(correction=0)",
           "team_returns.std()"),
    Mutant(ALL, "the team's return is the mean", MAIN + "evaluations_are_logged_as_they_were_played",
           "team_returns = agent_returns.sum(-1)",
           "team_returns = agent_returns.mean(-1)"),
    # RUN FOLDER
    Mutant(ALL, "the file is not synced", RESUME + "write_atomically_syncs_before_it_renames",
           "os.fsync(file.fileno())",
           "pass"),
    Mutant(ALL, "the file is written in place", RESUME + "write_atomically_leaves_the_old_file",
           'temporary = path + ".tmp"',
           "temporary = path"),
    Mutant(SIBLINGS, "another script's checkpoint is taken", INPUT + "resume_from_another_script",
           'if checkpoint["script"] != SCRIPT or not same_version:',
           "if not same_version:"),
    Mutant(ONE, "settings of a resume are not compared", INPUT + "resume_with_other_settings",
           "if value != saved[name] and",
           "if False and"),
    Mutant(ALL, "the checkpoint interval may not change", INPUT + "resume_with_settings_that_do_not_touch_the_numbers",
           '            "checkpoint_interval",\n            "num_workers",',
           '            "num_workers",'),
    Mutant(ALL, "a stop signal raises nothing", RUN_FOLDER + "a_signal_is_answered_under_raised_alone",
           "if self.raising:\n            raise Stopped",
           "pass"),
    Mutant(ALL, "a stop signal that came before raises nothing", RUN_FOLDER + "a_signal_is_answered_under_raised_alone",
           "            if self.received:\n                raise Stopped\n",
           ""),
    Mutant(ALL, "a stop signal raises everywhere", RUN_FOLDER + "a_signal_is_answered_under_raised_alone",
           "            self.raising = False\n",
           "            pass\n"),
    Mutant(ALL, "a second signal is lost", RUN_FOLDER + "a_second_signal_ends_the_process_unless_it_comes_at_once",
           "signal.signal(signum, signal.SIG_DFL)\n                os.kill(os.getpid(), signum)",
           "pass"),
    Mutant(ALL, "a signal that is sent twice kills",
           RUN_FOLDER + "a_second_signal_ends_the_process_unless_it_comes_at_once",
           "if time.monotonic() > self.received_at + 1:",
           "if True:"),
    Mutant(ONE, "nohup is overruled", RUN_FOLDER + "a_hangup_that_nohup_ignores_stays_ignored",
           "and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN",
           ""),
    Mutant(ONE, "a reader that has gone away ends the run", RUN_FOLDER + "a_lasting_stream_drops_what_nobody_reads",
           "except (OSError, ValueError):\n            self",
           "except ValueError:\n            self"),
    Mutant(ONE, "a closed stream ends the run", RUN_FOLDER + "a_lasting_stream_drops_what_nobody_reads",
           "except (OSError, ValueError):\n            self",
           "except OSError:\n            self"),
    Mutant(ALL, "half a file stays on a full disk", RESUME + "write_atomically_removes_what_it_cannot_finish",
           "os.remove(temporary)",
           "pass"),
    Mutant(TWO, "checksums are not looked at", RUN_FOLDER + "no_flipped_bit_goes_unnoticed",
           "damaged = zipfile.ZipFile(data).testzip()",
           "damaged = None"),
    Mutant(ONE, "an older version's checkpoint is taken",
           FAULTS + "a_checkpoint_of_an_older_version_is_refused_in_one_sentence",
           "same_version = keys <= checkpoint.keys() and ",
           "same_version = "),
    Mutant(ALL, "determinism is a dead flag", MAIN + "the_determinism_flag_reaches_pytorch_on_a_gpu",
           "torch.use_deterministic_algorithms(args.torch_deterministic)",
           "torch.use_deterministic_algorithms(True)"),
    Mutant(ALL, "a run folder is overwritten", INPUT + "a_run_folder_is_never_overwritten",
           "                os.makedirs(run_dir)\n",
           "                os.makedirs(run_dir, exist_ok=True)\n"),
    Mutant(TWO, "no lock", RUN_FOLDER + "a_locked_run_is_refused",
           "fcntl.lockf(run_file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
           "pass"),
    Mutant(TWO, "a run folder has no owner", RUN_FOLDER + "the_checkpoint_of_another_run_is_refused",
           "if owner != run_name:",
           "if False:"),
    Mutant(ONE, "the newest checkpoint is not asked whose it is",
           FAULTS + "another_runs_checkpoint_is_refused_without_run_json_too",
           'if owner != checkpoint["run_name"]:',
           "if False:"),
    Mutant(TWO, "an older copy cuts the run back",
           RUN_FOLDER + "an_older_copy_is_refused_where_its_run_is_further_on",
           'if other["global_step"] > checkpoint["global_step"]:',
           "if False:"),
    Mutant(ONE, "the newest checkpoint is read before the lock alone",
           FAULTS + "a_resume_that_waited_while_the_run_went_on_does_not_cut_it_back",
           "    if checkpoint is not None:\n        check_newest_checkpoint(run_dir, args, checkpoint)  # again",
           "    # again"),
    Mutant(TWO, "event files keep their names", RUN_FOLDER + "curves_are_complete_whatever_the_clock_says",
           "os.rename(os.path.join(run_dir, name), os.path.join(run_dir, new_name))",
           "pass"),
    Mutant(ALL, "the curves of the killed process stay", RUN_FOLDER + "a_full_disk",
           "purge_step=global_step + 1 if resumed else None",
           "purge_step=None"),
    Mutant(ALL, "the settings are not logged", MAIN + "the_settings_are_logged",
           'writer.add_text("hyperparameters", ',
           'len('),
    Mutant(ALL, "PyTorch's generator is not restored", RESUME + "resume_is_exact",
           'torch.set_rng_state(random_state["torch_rng"])',
           "pass"),
    Mutant(ALL, "every iteration is saved", MAIN + "checkpoints_are_written_when_they_are_due",
           "global_step // interval > saved_step // interval",
           "global_step > saved_step"),
    Mutant(ALL, "a multiple of the interval is due one frame late", MAIN + "when_a_checkpoint_is_due",
           "global_step // interval > saved_step // interval",
           "(global_step - 1) // interval > saved_step // interval"),
    Mutant(ALL, "the end is saved twice", MAIN + "when_a_checkpoint_is_due",
           "if interval == 0 or global_step >= args.total_timesteps:",
           "if interval == 0 or global_step > args.total_timesteps:"),
    Mutant(ALL, "a checkpoint of the iteration before", RESUME + "a_checkpoint_is_complete",
           '"iteration": iteration,',
           '"iteration": iteration - 1,'),
    # SET-UP
    Mutant(ALL, "threads are a dead flag", MAIN + "the_threads_reach_pytorch",
           "torch.set_num_threads(args.num_threads)",
           "torch.set_num_threads(1)"),
    Mutant(ALL, "PyTorch is not seeded", RESUME + "same_seed_same_run",
           "torch.manual_seed(args.seed)",
           "pass"),
    Mutant(ALL, "the same boards in every environment",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "make_env(args.env_id, args.winner_take_all, seed) for seed in env_seeds]",
           "make_env(args.env_id, args.winner_take_all, env_seeds[0]) for seed in env_seeds]"),
    Mutant(ALL, "training boards do not depend on the seed",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "np.random.SeedSequence(args.seed)",
           "np.random.SeedSequence(1)"),
    Mutant(ALL, "the critic's width is fixed", MAIN + "hidden_dim_is_the_width_of_policy_and_critic",
           "N, args.hidden_dim, 1)",
           "N, 128, 1)"),
    Mutant(ALL, "another eps", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_options",
           '"eps": args.adam_eps',
           '"eps": 1e-8'),
    Mutant(ALL, "a fixed learning rate", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_options",
           '"lr": args.learning_rate',
           '"lr": 5e-4'),
    Mutant(DG, "a fixed learning rate of the models",
           MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_options",
           "torch.optim.Adam(graph_models.parameters(), **adam)",
           'torch.optim.Adam(graph_models.parameters(), **adam | {"lr": 5e-4})'),
    Mutant(ALL, "another eps of the critic", MAIN + "every_adam_has_the_learning_rate_and_the_eps_of_the_options",
           "torch.optim.Adam(critic.parameters(), **adam)",
           'torch.optim.Adam(critic.parameters(), **adam | {"eps": 1e-8})'),
    Mutant(ALL, "the critic's moments are not saved", RESUME + "a_checkpoint_is_complete",
           '        "critic_optimizer": critic_optimizer,\n',
           ""),
    Mutant(TWO, "evaluations.csv is not written again", RUN_FOLDER + "a_lost_evaluations_csv_returns",
           "    if evaluations:\n        write_evaluations(run_dir, evaluations)\n",
           ""),
    Mutant(ALL, "frames per second from 0 after a resume",
           MAIN + "frames_per_second_count_from_the_start_of_the_process",
           "start_step = global_step",
           "start_step = 0"),
    # EVALUATE
    Mutant(ALL, "every evaluation has the index 0",
           MAIN + "every_evaluation_and_every_training_episode_plays_a_board_of_its_own",
           "                    agent_returns = evaluate(actor, args, global_step // args.eval_interval, device)",
           "                    agent_returns = evaluate(actor, args, 0, device)"),
    Mutant(ALL, "the bar does not show the closing evaluation", RUNS + "a_script_alone_in_an_empty_folder",
           '            last_return = evaluations[-1]["episodic_return"]',
           '            last_return = evaluations[0]["episodic_return"]'),
    Mutant(TWO, "a stop waits for the first evaluation", RUN_FOLDER + STOP,
           "            with stop_signals.raised():\n                agent_returns =",
           "            with contextlib.nullcontext():\n                agent_returns ="),
    Mutant(TWO, "a stop waits for an evaluation", RUN_FOLDER + STOP,
           "                with stop_signals.raised():\n                    agent_returns =",
           "                with contextlib.nullcontext():\n                    agent_returns ="),
    # SAVE
    Mutant(ALL, "the end is not saved", MAIN + "checkpoints_are_written_when_they_are_due",
           "if stop_signals.received or args.checkpoint_interval or args.save_model:",
           "if stop_signals.received or args.save_model:"),
    Mutant(ALL, "--save-model is dead", MAIN + "hidden_dim_is_the_width_of_policy_and_critic",
           "if stop_signals.received or args.checkpoint_interval or args.save_model:",
           "if stop_signals.received or args.checkpoint_interval:"),
    Mutant(TWO, "no checkpoint at a stop signal", RUN_FOLDER + STOP,
           "if stop_signals.received or args.checkpoint_interval or args.save_model:",
           "if args.checkpoint_interval or args.save_model:"),
    Mutant(TWO, "what was dropped at a stop has used up random numbers", RUN_FOLDER + STOP,
           "        try:\n            save_checkpoint(run_dir, run_name, args, trained, random_state,",
           "        try:\n            save_checkpoint(run_dir, run_name, args, trained, get_random_state(envs),"),
    Mutant(ONE, "status 0 after a stop signal", RUN_FOLDER + "a_stop_between_the_parts_is_answered_after_them",
           "sys.exit(128 + stop_signals.received)",
           "sys.exit(0)"),
    # COLLECT
    Mutant(ALL, "frames of the padding count", MAIN + "training_episodes_are_logged_as_they_were_played",
           "global_step += int(alive.sum())",
           "global_step += alive.numel()"),
    Mutant(TWO, "a stop waits for the collection", RUN_FOLDER + "a_collection_that_is_stopped_is_no_iteration",
           "with stop_signals.raised():\n                rollout =",
           "with contextlib.nullcontext():\n                rollout ="),
    # DEPENDENCE GRAPH, in main
    Mutant(DG, "the oracle's distance is a dead flag", MAIN + "the_oracle_looks_at_the_positions_after_the_step",
           "oracle_graph(positions, args.oracle_distance)",
           "oracle_graph(positions, 3)"),
    # ADVANTAGES, in main
    Mutant(DG, "the critic's target is DG's", MAIN + "what_the_update_learns_from",
           "value_targets = gae(*experience, args.gamma, args.gae_lambda) + values[:-1]\n"
           "            advantages = multi_agent_gae(*experience, graph, args.gamma, args.gae_lambda, args.soft)",
           "advantages = multi_agent_gae(*experience, graph, args.gamma, args.gae_lambda, args.soft)\n"
           "            value_targets = advantages + values[:-1]"),
    Mutant(ONE, "--no-soft is dead", RUNS + "soft_weights_and_the_limits_of_the_graph",
           "args.gae_lambda, args.soft)",
           "args.gae_lambda)"),
    Mutant(LOCAL, "local rewards are shared", MAIN + "what_the_update_learns_from",
           "experience = (rollout.rewards,",
           "experience = (rollout.rewards.mean(-1, keepdim=True).expand_as(rollout.rewards),"),
    Mutant(GLOBAL, "global rewards are the mean", MAIN + "what_the_update_learns_from",
           "rewards.sum(-1, keepdim=True)",
           "rewards.mean(-1, keepdim=True)"),
    # UPDATE POLICY AND CRITIC
    Mutant(ALL, "padding is learned from", LEARNING + "padding_never_changes_a_loss",
           "losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, batch, args)",
           "padded = (rollout.obs[:-1], rollout.actions, rollout.logprobs, advantages, value_targets)\n"
           "            padded = Batch(*(x.flatten(0, 1) for x in padded))\n"
           "            losses = ppo_update(actor, critic, actor_optimizer, critic_optimizer, padded, args)"),
    Mutant(DG, "the models learn before the graph is read",
           RUNS + "the_graph_comes_from_models_trained_up_to_the_iteration_before",
           "            graph, graph_charts = dependence_graph(",
           "            update_graph_models(graph_logits, rollout.actions[alive], models_optimizer)\n"
           "            graph_logits = graph_models(rollout.obs, alive)\n"
           "            graph, graph_charts = dependence_graph("),
    Mutant(ALL, "explained variance with the padding",
           MAIN + "explained_variance_is_that_of_the_values_before_the_update",
           "explained_variance(values[:-1][alive], batch.value_targets)",
           "explained_variance(values[:-1], value_targets)"),
    Mutant(ALL, "the random state of the first iteration is saved", RESUME + "resume_is_exact",
           "            random_state = get_random_state(envs)\n\n            # LOG",
           "\n            # LOG"),
    # LOG
    Mutant(ALL, "steps are logged as iterations", MAIN + "training_episodes_are_logged_as_they_were_played",
           "log_scalars(writer, global_step, {",
           "log_scalars(writer, iteration, {"),
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
