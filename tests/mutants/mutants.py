"""The mutants: what is exchanged, and the tests that must notice."""

from __future__ import annotations

from typing import NamedTuple


class Mutant(NamedTuple):
    """One replacement in one file."""

    name: str
    file: str
    old: str  # stands in the file once
    new: str
    tests: tuple[str, ...]


COLLECT, SAMPLERS, LEARN = ("tests/test_collect.py",), ("tests/test_samplers.py",), ("tests/test_learn.py",)
STAGES, WIRING, LABELING = ("tests/test_stages.py",), ("tests/test_wiring.py",), ("tests/test_labeling.py",)
BRIDGE, HELD_OUT = ("tests/test_text_bridge.py",), ("tests/test_held_out.py",)
LOSSES = ("tests/test_losses.py", "tests/test_objectives.py")
RATERS, RATED = ("tests/test_raters.py",), ("tests/test_rated.py",)
PAIR_STUDY, FINE_TUNE = ("tests/test_pair_study.py",), ("tests/test_fine_tune.py",)
PPO = ("tests/test_ppo.py",)
FIXED_POINTS, ONLINE = ("tests/test_fixed_points.py",), ("tests/test_online_objectives.py",)
RATINGS = ("tests/test_ratings.py",)
FORMS, MODELS = ("tests/test_preference_models.py",), ("tests/test_compare_models.py",)
CYCLES = ("tests/test_transitivity.py",)
SUMMARY, TLDR = ("tests/test_summary.py",), ("tests/test_tldr_study.py",)
CLIENT, CHAT = ("tests/test_http_client.py",), ("tests/test_http_judge.py",)
_DATA = "alignjax/pipeline/stages/policy_data.py"

MUTANTS = (
    Mutant(
        "P is asked with y and y' exchanged", "alignjax/training/collect.py",
        "view.responses[i], view.responses[j])", "view.responses[j], view.responses[i])", COLLECT,
    ),
    Mutant(
        "a pair's sides are exchanged and its label is kept", "alignjax/pipeline/stages/pair_batches.py",
        "Response(pad(first, limits.response)), Response(pad(second, limits.response))",
        "Response(pad(second, limits.response)), Response(pad(first, limits.response))", WIRING,
    ),
    Mutant(
        "the mixture's reference is the policy", "alignjax/sampling/samplers.py",
        "prefill(roles[role], ", "prefill(roles[Role.POLICY], ", SAMPLERS,
    ),
    Mutant(
        "the moving average is the policy", "alignjax/sampling/samplers.py",
        "moving_average = Sampler(Role.AVERAGE)", "moving_average = Sampler(Role.POLICY)", SAMPLERS,
    ),
    Mutant(
        "the reference is the adapted policy", "alignjax/training/collect.py",
        "frozen.reference or {}", "assemble(state.params, frozen)", WIRING,
    ),
    Mutant(
        "P sees stop tokens that it never saw in training", "alignjax/training/collect.py",
        "hide_tokens(sample.completion, self.unseen)", "hide_tokens(sample.completion, ())", COLLECT,
    ),
    Mutant(
        "a blank response does not lose", "alignjax/training/collect.py",
        "~is_blank(sample.completion, self.stop, self.blank)",
        "sample.completion.mask[:, 0] | sample.completion.mask[:, 0]", COLLECT,
    ),
    Mutant(
        "white space is a reply", _DATA, "unseen_stops(task, tokenizer), blank, setup",
        "unseen_stops(task, tokenizer), (), setup", WIRING,
    ),
    Mutant(
        "an unfinished response does not lose", "alignjax/training/collect.py",
        "accepted & (sample.finished | (not self.unfinished_loses))", "accepted & (sample.finished | True)", COLLECT,
    ),
    Mutant(
        "a refused response does not lose", "alignjax/training/collect.py",
        "accepted & (sample.finished", "(sample.finished", COLLECT,
    ),
    Mutant(
        "a response that loses outright keeps its reward", "alignjax/types.py",
        "return jnp.where(first & second, self.reward[:, i] - self.reward[:, j], unequal)",
        "return self.reward[:, i] - self.reward[:, j]", COLLECT,
    ),
    Mutant(
        "earlier turns have the polarity of the last one", "alignjax/tasks/dialogue_format.py",
        'f"{ASSISTANT} {earlier}:")', 'f"{ASSISTANT} {last}:")', ("tests/test_dialogue.py",),
    ),
    Mutant(
        "a rater reads the end marker", "alignjax/tasks/task.py",
        'f"{reply_format.before}{reply}" for reply', 'reply_text(reply_format, reply) for reply',
        ("tests/test_prompt_material.py",),
    ),
    Mutant(
        "the tournament asks training prompts", "alignjax/pipeline/stages/tournament.py",
        "task.source.prompts(self.split, self.prompts,", 'task.source.prompts("train", self.prompts,', WIRING,
    ),
    Mutant(
        "a policy learns on test prompts", _DATA,
        'source.prompts("train", self.prompts,', 'source.prompts("test", self.prompts,', WIRING,
    ),
    Mutant(
        "the KL estimate has the other sign", "alignjax/sampling/generate.py",
        "(logp - reference_logp).sum(-1)", "(reference_logp - logp).sum(-1)", WIRING,
    ),
    Mutant(
        "the KL is measured to the policy itself", "alignjax/pipeline/stages/tournament.py",
        "score=(score, reference.params)", "score=(score, policy.params)", WIRING,
    ),
    Mutant(
        "the example number is not folded into a reply's key", "alignjax/sampling/generate.py",
        "(None, 0))(key, numbers)", "(None, 0))(key, numbers * 0)", WIRING,
    ),
    Mutant(
        "the baseline 1/2 is 0", "alignjax/losses/policy_gradient.py", "preference - 0.5, tau",
        "preference, tau", LOSSES,
    ),
    Mutant(
        "antisymmetric up to rounding", "alignjax/preferences/preference_models.py",
        "return -order * margin(params, prompt, low, high)", "return margin(params, prompt, first, second)",
        ("tests/test_preference_models.py",),
    ),
    Mutant(
        "offline pairs come from the held-out split", _DATA,
        'read_stage_pairs(context, self.pairs, "train")', 'load_pairs(context, self.pairs, "held_out")', WIRING,
    ),
    Mutant(
        "direct alignment takes the label of the exchanged pair", "alignjax/objectives/direct.py",
        "p = batch.probability(0, 1)\n        loss, sign", "p = batch.probability(1, 0)\n        loss, sign", LOSSES,
    ),
    Mutant(
        "the reward's margin is reversed", "alignjax/objectives/preference.py",
        "batch.margin(0, 1)", "batch.margin(1, 0)", LOSSES,
    ),
    Mutant(
        "the preference gradient takes the opponent's probability", "alignjax/objectives/preference.py",
        "response, preference = batch.responses[0], batch.probability(0, 1)",
        "response, preference = batch.responses[0], batch.probability(1, 0)", LOSSES,
    ),
    Mutant(
        "the preference gradient scores the opponent's response", "alignjax/objectives/preference.py",
        "response, preference = batch.responses[0],", "response, preference = batch.responses[1],", LOSSES,
    ),
    Mutant(
        "the KL of a token counts its own term alone", "alignjax/losses/policy_gradient.py",
        "tau * reward_to_go(log_ratio)", "tau * log_ratio", LOSSES,
    ),
    Mutant(
        "gradient flows through the advantage", "alignjax/losses/policy_gradient.py",
        "logp * lax.stop_gradient(advantage)", "logp * advantage", LOSSES,
    ),
    Mutant(
        "every step has the same randomness", "alignjax/training/learn.py",
        "jax.random.fold_in(state.key, state.step)", "jax.random.fold_in(state.key, 0)", COLLECT,
    ),
    Mutant(
        "the responses to one prompt share their randomness", "alignjax/sampling/samplers.py",
        "(None, 0))(key, jnp.arange(count))", "(None, 0))(key, 0 * jnp.arange(count))", SAMPLERS,
    ),
    Mutant(
        "the rows of a batch share their randomness", "alignjax/sampling/samplers.py",
        "(sampler_keys, row))(jnp.arange(rows))", "(sampler_keys, row))(0 * jnp.arange(rows))", SAMPLERS,
    ),
    Mutant(
        "the moving average forgets instead of remembering", "alignjax/training/learn.py",
        "average_decay * a + (1 - average_decay) * p", "average_decay * p + (1 - average_decay) * a", LEARN,
    ),
    Mutant(
        "an epoch uses one minibatch again and again", "alignjax/training/learn.py",
        "jnp.asarray(x)[order[part]]", "jnp.asarray(x)[order[0]]", LEARN,
    ),
    Mutant(
        "accumulated parts are one part repeated", "alignjax/training/learn.py",
        "x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)",
        "x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1)[jnp.zeros(accumulate, int)]", LEARN,
    ),
    Mutant(
        "an erring annotator never errs", "alignjax/labeling/judged.py", "1 - p if wrong else p", "p", LABELING,
    ),
    Mutant(
        "RLCD prefers the negative side", "alignjax/labeling/rlcd.py", "float(not swapped)", "float(swapped)", LABELING,
    ),
    Mutant(
        "RLCD's earlier turns carry the polarity of the last", "alignjax/labeling/rlcd.py",
        "positive = [contrast(x, plus, minus)", "positive = [contrast(x, plus, plus)", LABELING,
    ),
    Mutant(
        "both replies of a pair share their randomness", "alignjax/labeling/method.py",
        "side * attempts + attempt", "attempt", LABELING,
    ),
    Mutant(
        "a tournament's row loses what it won", "alignjax/preferences/tournament.py",
        "judge(list(prompts), list(replies[name]), list(replies[names[j]]))",
        "judge(list(prompts), list(replies[names[j]]), list(replies[name]))", ("tests/test_tournament.py",),
    ),
    Mutant(
        "the policies of a tournament share their randomness", "alignjax/pipeline/stages/tournament.py",
        "zlib.crc32(name.encode())", 'zlib.crc32(b"policy")', WIRING,
    ),
    Mutant(
        "a judge may be fitted to pairs that P was measured on", "alignjax/pipeline/judges.py",
        "judged.fitted & (trained.fitted | trained.measured)", "judged.fitted & trained.fitted", HELD_OUT,
    ),
    Mutant(
        "a judge may be the model that a policy was trained against", "alignjax/pipeline/judges.py",
        "if models & trained.trained_against:", "if False:", HELD_OUT,
    ),
    Mutant(
        "a policy trained offline has seen nothing", _DATA,
        "return context.exposure(self.pairs)",
        "return Exposure()", HELD_OUT,
    ),
    Mutant(
        "a judge made from P counts as held out", "alignjax/pipeline/judges.py",
        "judged.identity | judged.made_from | judged.trained_against", "judged.identity | judged.trained_against",
        HELD_OUT,
    ),
    Mutant(
        "a judge that P taught counts as held out", "alignjax/pipeline/judges.py",
        "judged.identity | judged.made_from | judged.trained_against", "judged.identity | judged.made_from", HELD_OUT,
    ),
    Mutant(
        "labels forget who wrote the replies", "alignjax/pipeline/stages/label.py",
        "trained_against=generator.trained_against | judged.identity", "trained_against=judged.identity", HELD_OUT,
    ),
    Mutant(
        "a policy gradient may learn from anybody's responses", "alignjax/pipeline/stages/policy_data.py",
        "if self.samplers[k].weights() != {role: 1}", "if False", WIRING,
    ),
    Mutant(
        "a judge runs another judge's program", "alignjax/pipeline/experiment.py",
        "if program.name in names)", "if program.name.startswith(tuple(names)))", ("tests/test_tournament.py",),
    ),
    Mutant(
        "the code of a user's class is not in the fingerprint", "alignjax/pipeline/description.py",
        'return described if _is_ours(type(node)) else {**described, "code": describe_code(type(node))}',
        "return described", ("tests/test_config.py",),
    ),
    Mutant(
        "metrics mix the epochs of a step", "alignjax/training/learn.py",
        "jnp.mean(values[last if name in last_epoch else first])", "jnp.mean(values)", PPO,
    ),
    Mutant(
        "an objective's head is not saved", "alignjax/pipeline/trained_parts.py",
        "heads = {name: params[name] for name in params.keys() - start.base.keys() - self.unsaved}",
        "heads = {}", WIRING,
    ),
    Mutant(
        "values are not those of the collection", "alignjax/training/collect.py",
        "lax.stop_gradient(objective.extras.prepare(roles, batch, policy))",
        "lax.stop_gradient(objective.extras.prepare(roles._replace(policy=roles.reference), batch, policy))",
        (*COLLECT, *WIRING),
    ),
    Mutant(
        "arms do not share their randomness", "alignjax/pipeline/experiment.py",
        "kind = type(self.experiment.stages[self.name]).__name__", "kind = self.name", ("tests/test_train_policy.py",),
    ),
    Mutant(
        "a resumed loop is shifted by a batch", "alignjax/training/loop.py",
        "run.mesh, start, learner.loop.steps)", "run.mesh, start and start + 1, learner.loop.steps)", (*LEARN, *WIRING),
    ),
    Mutant(
        "a prompt's row is taken for its number", _DATA, "pad([ids[kept[i]] for i", "pad([ids[i] for i", WIRING,
    ),
    Mutant(
        "the average that a training keeps is its last policy", "alignjax/pipeline/stages/train_policy.py",
        "trained.average))", "trained.params))", ("tests/test_kept_policy.py",),
    ),
    Mutant(
        "what a training keeps at a step has its heads", "alignjax/pipeline/networks.py",
        'str(at), owned_params(network))', 'str(at), {**owned_params(network), **network.heads})',
        ("tests/test_kept_policy.py",),
    ),
    Mutant(
        "replies of a policy that was made again are reused", "alignjax/pipeline/stages/replies.py",
        "found.get(_MADE_BY) == digest", "_MADE_BY in found", ("tests/test_gather.py",),
    ),
    Mutant(
        "a table that gathers takes in what is not finished", "alignjax/pipeline/gathering.py",
        "part = stage.among(finished)", "part = stage", ("tests/test_gather.py",),
    ),
    Mutant(
        "a judge that is not held out keeps its name", "alignjax/pipeline/training_judge.py",
        'f"{name}{_MARK}" if', "name if", ("tests/test_gather.py",),
    ),
    Mutant(
        "P_tau pays the other side's KL", "alignjax/preferences/tournament.py",
        "log_ratio[:, None] - log_ratio[None]", "log_ratio[None] - log_ratio[:, None]", ("tests/test_tournament.py",),
    ),
    Mutant(
        "the entropy is the KL", "alignjax/pipeline/stages/replies.py",
        "-float(np.mean(a + b))", "float(np.mean(a))", ("tests/test_tournament.py",),
    ),
    Mutant(
        "several processes go on after an error of one", "alignjax/pipeline/run.py",
        "if not keep_going or not context.hosts.all_meet", "if not keep_going and not context.hosts.all_meet",
        ("tests/test_keep_going.py",),
    ),
    Mutant(
        "the best save is the worst", "alignjax/training/loop.py",
        "(-1 if self.lowest else 1)", "(1 if self.lowest else -1)", ("tests/test_best.py",),
    ),
    Mutant(
        "adapters are not scaled", "alignjax/pipeline/trained_parts.py", "params, spec.scale)", "params, 1.0)",
        ("tests/test_export.py",),
    ),
    Mutant(
        "text between tokenizers is not filtered", "alignjax/training/text_bridge.py",
        'self.task.clean(text) or ""', "text", BRIDGE,
    ),
    Mutant(
        "text between tokenizers is not cut", "alignjax/training/text_bridge.py",
        "row[: self.longest] for row", "row[: self.longest - 1] for row", BRIDGE,
    ),
    Mutant(
        "a preference model is measured on what it was fitted to", "alignjax/pipeline/stages/fit_preference.py",
        '"held_out" if self.truth == self.pairs else "train"', '"train"', STAGES,
    ),
    Mutant(
        "held-out pairs of a file are trained on", "alignjax/pipeline/stages/load.py",
        'if row["prompt"] not in last]}', "]}", WIRING,
    ),
    Mutant(
        "an empty reply does not lose to a judge", "alignjax/preferences/judges.py",
        "np.where(first * second > 0, probability(logits), 0.5 + 0.5 * (first - second))", "probability(logits)",
        ("tests/test_tournament.py",),
    ),
    Mutant(
        "non-finite log-probs are written as text", "alignjax/sampling/generate.py",
        "if not bool(drawn.finite):", "if False:", WIRING,
    ),
    Mutant(
        "length is controlled at another length than 0", "alignjax/preferences/statistics.py",
        "return float(theta)", "return float(theta + phi)", ("tests/test_statistics.py",),
    ),
    Mutant(
        "P = 1/2 agrees with people", "alignjax/preferences/statistics.py",
        "np.sum(probability > 0.5)", "np.sum(probability >= 0.5)", ("tests/test_statistics.py",),
    ),
    Mutant(
        "the perplexity is the policy's own", "alignjax/sampling/generate.py",
        "(logp - reference_logp).sum(-1), reference_logp.sum(-1)", "(logp - reference_logp).sum(-1), logp.sum(-1)",
        ("tests/test_exchange.py",),
    ),
    Mutant(
        "AlpacaEval's preference is that of the baseline", "alignjax/reporting/exchange.py",
        '"preference": 1 + p', '"preference": 2 - p', ("tests/test_exchange.py",),
    ),
    Mutant(
        "the loser of a pair is exported as chosen", "alignjax/pipeline/export_pairs.py",
        'if pair["p"] else', 'if not pair["p"] else', ("tests/test_export_pairs.py",),
    ),
    Mutant(
        "a trained network is saved without its adapters' base", "alignjax/pipeline/trained_parts.py",
        "start.shared_base.stage if start.shared_base else start.stage", "start.stage", (*WIRING, *STAGES),
    ),
    Mutant(
        "a chat model sees both orders alike", "alignjax/preferences/http_judge.py",
        "self.form.body(prompts[i], others[i], replies[i])", "self.form.body(prompts[i], replies[i], others[i])", CHAT,
    ),
    Mutant(
        "the place that wins in both orders agrees", "alignjax/preferences/http_judge.py",
        "np.sum(there * back > 0)", "np.sum(there * back < 0)", CHAT,
    ),
    Mutant(
        "requests of different models share an answer", "alignjax/preferences/http_answers.py",
        "json.dumps(body, sort_keys=True)", 'json.dumps(body["messages"], sort_keys=True)', CLIENT,
    ),
    Mutant(
        "every process asks", "alignjax/preferences/http_client.py",
        "distinct if hosts.is_first else {}", "distinct", CLIENT,
    ),
    Mutant(
        "an endpoint that asks to wait is asked at once", "alignjax/preferences/http_client.py",
        "max(back_off(digest, number, limits), outcome.retry_after)", "back_off(digest, number, limits)", CLIENT,
    ),
    Mutant(
        "the judge that labelled the pairs judges the table", "alignjax/pipeline/judges.py",
        "return Exposure(identity=frozenset({hashlib.sha256(self.model.encode()).hexdigest()[:16]}))",
        "return Exposure()", CHAT,
    ),
    Mutant(
        "a resumed labelling forgets what was counted", "alignjax/pipeline/stages/label.py",
        '[chunk["judge_counts"] for chunk in chunks]', "[counts]", CHAT,
    ),
    Mutant(
        "every pair is asked the first question", "alignjax/preferences/raters.py",
        "map(rater_text, questions, ", "map(rater_text, questions[:1] * len(prompts), ", RATERS,
    ),
    Mutant(
        "every question has the answers of the first", "alignjax/preferences/raters.py",
        "answers[full, 0], answers[full, 1]", "answers[0 * full, 0], answers[0 * full, 1]", RATERS,
    ),
    Mutant(
        "the orders of a rater are added", "alignjax/preferences/raters.py",
        "(forward - backward) / 2", "(forward + backward) / 2", RATERS,
    ),
    Mutant(
        "an empty reply does not lose to a rater", "alignjax/preferences/raters.py",
        "return np.where(first & second, log_odds, np.where(first == second, 0.0, outright))", "return log_odds",
        RATERS,
    ),
    Mutant(
        "an example of few_shot has the answer of the first", "alignjax/tasks/task.py",
        "(question.answer if is_first else question.other)", "question.answer", RATERS,
    ),
    Mutant(
        "RLAIF asks another question than it stores", "alignjax/labeling/rated.py",
        "[row[3] for row in rows])", "[0 for row in rows])", RATED,
    ),
    Mutant(
        "replies under a positive prompt are written under the negative one", "alignjax/labeling/rated.py",
        "contrast(x, *task.affixes[i])", "contrast(x, *task.affixes[i][::-1])", RATED,
    ),
    Mutant(
        "every question is the first", "alignjax/labeling/rated.py",
        "for question in dict.fromkeys(task.questions)", "for question in task.questions[:1]", RATED,
    ),
    Mutant(
        "RLAIF's label is of the exchanged pair", "alignjax/labeling/rated.py",
        "LabeledPair(x, y, z, float(q), i)", "LabeledPair(x, z, y, float(q), i)", RATED,
    ),
    Mutant(
        "RLCD calls the negative reply positive", "alignjax/labeling/rlcd.py",
        "affix, int(swapped)", "affix, int(not swapped)", RATED,
    ),
    Mutant(
        "a relabelling asks the first question alone", "alignjax/pipeline/stages/relabel.py",
        '[row["affix"] for row in chunk]', "[0 for row in chunk]", RATED,
    ),
    Mutant(
        "a relabelling forgets which reply was positive", "alignjax/pipeline/stages/relabel.py",
        '{**row, "p": p}', '{**row, "p": p, "positive": -1}', RATED,
    ),
    Mutant(
        "a relabelling forgets its rater", "alignjax/pipeline/stages/relabel.py",
        "pairs.trained_against | judged.identity | judged.trained_against", "pairs.trained_against", HELD_OUT,
    ),
    Mutant(
        "a mixture repeats pairs", "alignjax/pipeline/stages/relabel.py",
        ".permutation(len(second))[:wanted]", ".integers(len(second), size=wanted)", RATED,
    ),
    Mutant(
        "a mixture forgets its second stage", "alignjax/pipeline/stages/relabel.py",
        "context.exposure(self.first, self.second)", "context.exposure(self.first)", HELD_OUT,
    ),
    Mutant(
        "a study's judge reads the replies exchanged", "alignjax/pipeline/stages/pair_study.py",
        '("prompt", "first", "second")', '("prompt", "second", "first")', PAIR_STUDY,
    ),
    Mutant(
        "a study reads the pairs held out", "alignjax/pipeline/stages/pair_study.py",
        'read_stage_pairs(context, stage, "train")', 'read_stage_pairs(context, stage, "held_out")', PAIR_STUDY,
    ),
    Mutant(
        "the positive reply is always the first", "alignjax/labeling/statistics.py",
        "np.where(positive == 0, pairs.judged < 0.5, pairs.judged > 0.5)", "pairs.judged < 0.5", PAIR_STUDY,
    ),
    Mutant(
        "agreement depends on the order of the replies", "alignjax/labeling/statistics.py",
        'frozenset((row["first"], row["second"]))', '(row["first"], row["second"])', PAIR_STUDY,
    ),
    Mutant(
        "prompts are learned", "alignjax/pipeline/stages/fine_tune.py",
        "[0] * len(prompt) + [1] * len(reply)", "[1] * len(prompt) + [1] * len(reply)", FINE_TUNE,
    ),
    Mutant(
        "the loss of packed examples does not read what is learned", "alignjax/objectives/supervised.py",
        "mask if batch.learned is None else mask & batch.learned[:, 1:]", "mask", FINE_TUNE,
    ),
    Mutant(
        "the first reply is imitated", "alignjax/pipeline/stages/fine_tune.py",
        'row["first" if row["p"] > 0.5 else "second"]', 'row["first"]', FINE_TUNE,
    ),
    Mutant(
        "pairs held out are imitated", "alignjax/pipeline/stages/fine_tune.py",
        'read_stage_pairs(context, self.pairs, "train")', 'read_stage_pairs(context, self.pairs, "held_out")',
        FINE_TUNE,
    ),
    Mutant(
        "the end of a reply is not learned", "alignjax/pipeline/stages/fine_tune.py",
        'f"{task.format.before}{reply}"), end]', 'f"{task.format.before}{reply}")]', FINE_TUNE,
    ),
    Mutant(
        "a fine-tuned policy has seen no pairs", "alignjax/pipeline/stages/fine_tune.py",
        "context.derived_exposure(self.start) | context.exposure(self.pairs)", "context.derived_exposure(self.start)",
        HELD_OUT,
    ),
    Mutant(
        "PPO pays an invalid response its reward", "alignjax/objectives/scoring.py",
        "reward=invalid(reward, valid))", "reward=reward)", PPO,
    ),
    Mutant(
        "PPO's KL is that of the reference to the policy", "alignjax/objectives/ppo.py",
        "require_behavior(response) - require_reference(response)",
        "require_reference(response) - require_behavior(response)", PPO,
    ),
    Mutant(
        "the critic learns whitened advantages", "alignjax/objectives/ppo.py",
        "return whitened, advantage + value", "return whitened, whitened + value", PPO,
    ),
    Mutant(
        "the score is paid at the first token", "alignjax/losses/ppo.py",
        "(jnp.cumsum(mask, -1) == jnp.sum(mask, -1, keepdims=True))", "(jnp.cumsum(mask, -1) == 1)", PPO,
    ),
    Mutant(
        "values are kept near their targets", "alignjax/losses/ppo.py",
        "near = old + jnp.clip(value - old,", "near = target + jnp.clip(value - target,", PPO,
    ),
    Mutant(
        "tau does not follow the KL", "alignjax/training/learn.py",
        "controls = extras.adapt(state.controls, batch)", "controls = state.controls", PPO,
    ),
    Mutant(
        "the learning rate moves within a batch", "alignjax/training/optimizer.py",
        "rate(count // updates)", "rate(count)", PPO,
    ),
    Mutant(
        "a critic of its own reads the policy's parameters", "alignjax/models/log_probs.py",
        'critic.completion_states(params["critic"], prompt', "critic.completion_states(params, prompt", WIRING,
    ),
    Mutant(
        "a critic of its own is saved with the policy", "alignjax/pipeline/trained_parts.py",
        'unsaved=frozenset({"critic", "value"})', "unsaved=frozenset()", WIRING,
    ),
    Mutant(
        "a group's baseline is another prompt's", "alignjax/losses/ppo.py",
        "return (reward - jnp.mean(reward, -1, keepdims=True)) * count", "return (reward - jnp.mean(reward)) * count",
        PPO,
    ),
    Mutant(
        "an extragradient step starts at the half point", "alignjax/training/learn.py",
        "jnp.where(is_whole, params, anchor)", "params", (*LEARN, *FIXED_POINTS),
    ),
    Mutant(
        "the half point does not write the second batch", "alignjax/training/collect.py",
        "        assemble(state.params, frozen), frozen.reference or {}",
        "        assemble(state.anchor or state.params, frozen), frozen.reference or {}", ONLINE,
    ),
    Mutant(
        "the anchor is not saved", "alignjax/training/checkpointing.py",
        "return tree if state.anchor else {", "return tree if not state.anchor else {",
        ("tests/test_checkpointing.py",),
    ),
    Mutant(
        "an iteration starts from the reference", "alignjax/objectives/direct.py",
        "behavior = [require_behavior(batch.responses[k]) for k in every]",
        "behavior = [require_reference(batch.responses[k]) for k in every]", FIXED_POINTS,
    ),
    Mutant(
        "a group's preferences are those of the others", "alignjax/objectives/direct.py",
        "jnp.stack([batch.probability(i, j) for j in every], 1)",
        "jnp.stack([batch.probability(j, i) for j in every], 1)", FIXED_POINTS,
    ),
    Mutant(
        "the opponent's win probabilities are exchanged", "alignjax/objectives/direct.py",
        "batch.probability(0, 2), batch.probability(1, 2)", "batch.probability(1, 2), batch.probability(0, 2)",
        FIXED_POINTS,
    ),
    Mutant(
        "the reference's pairs may be anybody's", "alignjax/objectives/direct.py",
        "return Extras(of_reference=self.of_reference)", "return Extras()", ONLINE,
    ),
    Mutant(
        "the lottery is the one that every policy beats", "alignjax/games/nash_face.py",
        "a = (p - p.T) / 2", "a = (p.T - p) / 2", RATINGS,
    ),
    Mutant(
        "copies of a policy count as others", "alignjax/games/nash_face.py",
        "is_copy = np.all(abs(p[:, None] - p[None]) <= COPY, axis=-1)", "is_copy = np.eye(len(p), dtype=bool)", RATINGS,
    ),
    Mutant(
        "a cell's number of comparisons does not weigh in Elo", "alignjax/preferences/elo.py",
        "wins = n * rate +", "wins = n.max() * rate +", RATINGS,
    ),
    Mutant(
        "exploitability is bounded as if one cell were looked at", "alignjax/preferences/rating_intervals.py",
        "each = 1 - (1 - level) / (size - 1)", "each = level", RATINGS,
    ),
    Mutant(
        "exploitability is of whom a policy beats", "alignjax/preferences/rating_intervals.py",
        "return ends.max(0) - 0.5", "return ends.max(1) - 0.5", RATINGS,
    ),
    Mutant(
        "an oracle may prefer both", "alignjax/preferences/judges.py",
        "abs(answers[0] + back - 1) > 1e-6", "abs(answers[0] + back - 1) > 1",
        ("tests/test_labeling.py",),
    ),
    Mutant(
        "the judges' curves are of votes", "alignjax/reporting/plots.py",
        'means = [table["mean_probability"]', 'means = [table["win_rate"]', ("tests/test_report.py",),
    ),
    Mutant(
        "a sloppy writer tells nothing twice", "alignjax/tasks/post_world.py",
        "    if is_sloppy:\n", "    if not is_sloppy:\n", ("tests/test_post_world.py",),
    ),
    Mutant(
        "each cell is resampled on its own, whatever the prompts say", "alignjax/preferences/rating_intervals.py",
        "if pool.votes is not None:\n        columns", "if pool.votes is None:\n        columns", RATINGS,
    ),
    Mutant(
        "a stage rates votes where it is to rate probabilities", "alignjax/pipeline/stages/rate_pool.py",
        "self.table), self.probabilities)", "self.table), False)", ("tests/test_rate_command.py",),
    ),
    Mutant(
        "the paper's form shows the pair exchanged", "alignjax/preferences/preference_models.py",
        "state = model.last_state(params, pair_context(template, prompt, first, second))",
        "state = model.last_state(params, pair_context(template, prompt, second, first))", FORMS,
    ),
    Mutant(
        "the paper's form is fitted in both orders", "alignjax/pipeline/stages/fit_preference.py",
        "loss=self.loss, logit=form.fitted)", "loss=self.loss, logit=form.logit)", MODELS,
    ),
    Mutant(
        "the paper's form reads the pairs as they are stored", "alignjax/pipeline/stages/fit_preference.py",
        "rows = shuffle_sides(rows, context.seed(self.seed))", "rows = list(rows)", MODELS,
    ),
    Mutant(
        "a pair is exchanged and its label is not", "alignjax/pipeline/stages/pair_batches.py",
        '"p": 1 - row["p"]} if coin', '"p": row["p"]} if coin', MODELS,
    ),
    Mutant(
        "both orders of the paper's form are one", "alignjax/pipeline/stages/compare_models.py",
        "model.logit, network, self.sizes()", "model.fitted, network, self.sizes()", MODELS,
    ),
    Mutant(
        "a judge asks the paper's form in one order", "alignjax/pipeline/judges.py",
        "self.model(context, network).logit, network", "self.model(context, network).fitted, network", MODELS,
    ),
    Mutant(
        "both orders are one", "alignjax/preferences/comparison.py",
        "texts += [(x, second, first) for x, first, second in texts]", "texts += list(texts)", CYCLES,
    ),
    Mutant(
        "the answers of the two orders are exchanged", "alignjax/preferences/comparison.py",
        "p[:, j, i] = backward", "p[:, j, i] = answers[:count]", CYCLES,
    ),
    Mutant(
        "a triple's third link is read the other way", "alignjax/preferences/transitivity.py",
        "1 - p[:, i, k]], -1)", "p[:, i, k]], -1)", CYCLES,
    ),
    Mutant(
        "a cycle is reproduced in the other direction", "alignjax/preferences/comparison.py",
        "hits = (own == wanted)", "hits = (own == -wanted)", CYCLES,
    ),
    Mutant(
        "the interval is over the pairs", "alignjax/preferences/statistics.py",
        "np.sum((totals - mean * counts) ** 2)", "np.sum(counts * mean * (1 - mean))", CYCLES,
    ),
    Mutant(
        "a post is cut at the first place that fits", "alignjax/tasks/summary.py",
        "{post[: places[count - 1]]}", "{post[: places[0]]}", SUMMARY,
    ),
    Mutant(
        "comparisons of every split are kept", "alignjax/tasks/summary.py",
        'row["split"] in splits', 'row["split"]', SUMMARY,
    ),
    Mutant(
        "comparisons of every confidence are kept", "alignjax/tasks/summary.py",
        "_read_confidence(row) in confidence", "_read_confidence(row) != 0", SUMMARY,
    ),
    Mutant(
        "a preference model is measured on longer prompts than it is fitted to",
        "alignjax/pipeline/stages/pair_batches.py", 'fitting.append({**row, "prompt": text})', "fitting.append(row)",
        SUMMARY,
    ),
    Mutant(
        "prompts of a policy are never shortened", _DATA,
        "drawn, max(setup.buckets))", "drawn, 2**30)", TLDR,
    ),
    Mutant(
        "table 1 has the row's rates over the column", "experiments/nlhf/table_1.py",
        "policy_name(column), policy_name(row)", "policy_name(row), policy_name(column)", TLDR,
    ),
    Mutant(
        "P_tau pays for the KL of the other policy", "experiments/nlhf/table_1.py",
        "tau * (other - own)", "tau * (own - other)", TLDR,
    ),
)  # fmt: skip
