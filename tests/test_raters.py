"""A language model as a rater: its log-odds against a plain forward pass, both orders, empty replies, examples."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

import alignjax as aj
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import encode_continuation, pad
from alignjax.pipeline.experiment import Context
from alignjax.preferences import preference_models
from alignjax.preferences.raters import (
    answer_log_odds,
    in_both_orders,
    language_model_rater,
    preference_probability,
    question_judge,
)
from alignjax.tasks.task import Format, RatedExample, Template, few_shot, rater_text
from alignjax.types import Tokens
from tests.test_wiring import MODEL, WORDS, Random, experiment, mesh, task, tokenizer

FORMAT = Format(before=" ", end=" END", stop=("END",))
ASKED = (
    Template(before=" one", between=" or", question=" which", answer=" yes", other=" no"),
    Template("", " two", " three", " no", " yes", preamble="red blue "),  # the answers stand the other way round
    Template("", " two", " three four", " red", " blue"),
)
T5 = aj.T5Config(vocab_size=300, width=16, layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=24, end_token=2)
MODELS = {"decoder": MODEL, "t5": T5}


def rows(count, seed=0):
    """Returns prompts, replies, other replies and questions of many lengths."""
    rng = np.random.default_rng(seed)
    texts = [[" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(count)] for _ in range(3)]
    return (*texts, [ASKED[i % 3] for i in range(count)])


def take(columns, indices):
    """Returns some of the rows."""
    return [[column[i] for i in indices] for column in columns]


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    """A random model of either kind, its parameters and the jitted question."""
    model = build(MODELS[request.param])
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    return model, params, answer_log_odds(model, mesh())


def rater_of(network, batch):
    _, params, ask = network
    return language_model_rater(ask, params, tokenizer(), FORMAT, batch=batch, mesh=mesh(), owner="the rater")


@functools.cache
def plain_pass(name):
    """Returns the jitted (params, ids of one context, length) -> log-probs or logits of the next token, [V].

    Of a decoder the forward pass over all tokens; of T5 the log-probs of every one-token completion.
    """
    model = build(MODELS[name])

    def decode(params, context, length):
        states = model.forward(params, context.tokens, jnp.asarray(context.mask, jnp.int32))
        return model.logits(params, states)[0, length - 1]

    def score(params, context, length):
        alone = Tokens(jnp.arange(300)[:, None], jnp.ones((300, 1), bool))
        return log_prob(model)(params, jax.tree.map(lambda x: jnp.repeat(x, 300, 0), context), alone)[:, 0]

    return jax.jit(decode if model.forward else score)


def by_hand(network, prompt, first, second, question):
    """The log-odds of one row, which the referee reads alone."""
    model, params, _ = network
    written = f"{question.preamble}{prompt}{question.before} {first}{question.between} {second}{question.question}"
    (answer,), (other,) = (encode_continuation(tokenizer(), piece) for piece in (question.answer, question.other))
    ids, name = tokenizer().encode(written), "decoder" if model.forward else "t5"
    next_token = np.asarray(plain_pass(name)(params, pad([ids], 48), len(ids)))
    return next_token[answer] - next_token[other]


def test_log_odds_are_those_of_a_plain_pass_over_the_rater_s_text(network):
    """Rows of one batch ask different questions, two of them with exchanged answers."""
    columns = rows(8)
    want = [by_hand(network, *row) for row in zip(*columns, strict=True)]
    found = rater_of(network, 8)(*columns)
    np.testing.assert_allclose(found, want, rtol=2e-4, atol=2e-4)
    exchanged = rater_of(network, 8)(*columns[:3], columns[3][1:] + columns[3][:1])
    assert np.abs(found - exchanged).min() > 1e-3 and np.abs(want).min() > 1e-3


def test_batches_padding_and_the_order_of_rows_change_nothing(network):
    columns = rows(19, seed=1)
    columns[0][4] = " ".join(WORDS * 5)  # one long row pads the others further
    whole = rater_of(network, 8)(*columns)
    np.testing.assert_allclose(rater_of(network, 24)(*columns), whole, rtol=1e-4, atol=1e-5)
    order = np.random.default_rng(0).permutation(19)
    np.testing.assert_allclose(rater_of(network, 8)(*take(columns, order)), whole[order], rtol=1e-4, atol=1e-5)
    few = [0, 7, 18]  # shorter rows, fewer than a batch
    np.testing.assert_allclose(rater_of(network, 8)(*take(columns, few)), whole[few], rtol=1e-4, atol=1e-5)


def test_both_orders_are_exactly_odd_and_equal_replies_have_0(network):
    prompts, first, second, questions = rows(16, seed=2)
    second[::4] = first[::4]
    both = in_both_orders(rater_of(network, 8))
    forward, backward = both(prompts, first, second, questions), both(prompts, second, first, questions)
    np.testing.assert_array_equal(forward, -backward)
    assert not forward[::4].any() and np.abs(forward).max() > 0.03
    single = rater_of(network, 8)(prompts, first, first, questions)
    assert np.abs(single).max() > 0.03  # one order has a bias to a position
    p = preference_probability(forward)
    np.testing.assert_array_equal(p + preference_probability(backward), np.ones(16))


def quality(text):
    return float(len(text))


def biased(prompts, replies, others, questions):
    """A rater of lengths that likes the first place."""
    return np.array([quality(y) - quality(z) + 0.75 for y, z in zip(replies, others, strict=True)])


def test_a_bias_to_a_position_cancels_in_both_orders():
    prompts, first, second, questions = rows(9)
    want = [quality(y) - quality(z) for y, z in zip(first, second, strict=True)]
    np.testing.assert_allclose(in_both_orders(biased)(prompts, first, second, questions), want)
    judge = question_judge(biased, ASKED[0])
    np.testing.assert_allclose(judge(prompts, first, second), special.expit(want), atol=1e-12)


def test_a_judge_asks_its_one_question_about_every_pair():
    asked = []

    def rater(prompts, replies, others, questions):
        asked.extend(zip(prompts, replies, others, questions, strict=True))
        return np.zeros(len(prompts))

    question_judge(rater, ASKED[2])(["x", "u"], ["y", "v"], ["z", "w"])
    assert asked == [
        ("x", "y", "z", ASKED[2]), ("u", "v", "w", ASKED[2]), ("x", "z", "y", ASKED[2]), ("u", "w", "v", ASKED[2]),
    ]  # fmt: skip


def test_an_empty_reply_loses_and_two_of_them_tie(network):
    first, second = ["red", "", "", "red"], ["", "red", "", "blue"]
    asked = (["one"] * 4, first, second, [ASKED[0]] * 4)
    for rater in (rater_of(network, 8), in_both_orders(rater_of(network, 8))):
        log_odds = rater(*asked)
        assert log_odds[:3].tolist() == [np.inf, -np.inf, 0.0] and np.isfinite(log_odds[3])
        assert preference_probability(log_odds)[:3].tolist() == [1.0, 0.0, 0.5]


def test_probabilities_are_the_sigmoid_and_sum_to_one_exactly():
    z = np.concatenate([np.random.default_rng(0).normal(0, 8, 200), [0.0, 40.0, -40.0, np.inf, -np.inf, 1e-9]])
    p = preference_probability(z)
    np.testing.assert_allclose(p, special.expit(z), rtol=1e-9, atol=1e-15)
    np.testing.assert_array_equal(p + preference_probability(-z), np.ones(len(z)))


def test_an_answer_of_several_tokens_is_refused_in_one_line(network):
    prompts, first, second, _ = rows(2)
    long = ASKED[0]._replace(other=" yes no")
    with pytest.raises(UserError, match=r"^the rater: a question's answer: ' yes no' is 2 tokens .*one token$"):
        rater_of(network, 8)(prompts, first, second, [ASKED[0], long])


def test_logits_that_are_not_finite_are_refused_in_the_rater_s_name(network):
    _, params, ask = network
    broken = jax.tree.map(lambda x: x * np.nan, params)
    rater = language_model_rater(ask, broken, tokenizer(), FORMAT, batch=8, mesh=mesh(), owner="the rater 'r'")
    with pytest.raises(UserError, match=r"^the rater 'r' gives logits that are not finite; its parameters are damaged"):
        rater(*rows(3))


def opened(spec, **changes):
    """Returns a rater or judge over the stage ``other``, as its user opens it, and its context."""
    whole = aj.Experiment(task(**changes), {"other": Random(1)}, mesh=aj.Mesh(data=-1))
    context = Context(whole, None, "other", mesh())
    network = context.abstract("other")
    context.loaded["other"] = type(network)("other", network.model, tokenizer(), "words", Random(1).params())
    sizes = aj.JudgeSizes(batch=8, prompt=8, reply=8)
    spec.check(context)
    return spec.open(context, spec.programs(context, "judge", sizes), sizes), context


def test_a_language_model_judge_says_what_the_choice_form_says_of_the_same_template():
    """The preference model concatenates tokens where the judge writes text; both average the two orders."""
    changes = {"format": Format(" ", " END", ("END",)), "template": ASKED[0]}
    judge, context = opened(aj.LanguageModelJudge("other"), **changes)
    prompts, first, second, _ = rows(8)
    encode = tokenizer().encode
    template = preference_models.template_tokens(tokenizer(), ASKED[0])
    form = preference_models.choice(context.abstract("other").model, template)
    sides = [pad([encode_continuation(tokenizer(), f" {text} END") for text in side], 24) for side in (first, second)]
    logit = form.logit(Random(1).params(), pad(list(map(encode, prompts)), 16), *sides)
    np.testing.assert_allclose(judge(prompts, first, second), special.expit(np.asarray(logit)), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(judge(prompts, first, second) + judge(prompts, second, first), np.ones(8))


def test_a_judge_with_a_question_of_its_own_asks_that_without_end_markers():
    judge, context = opened(aj.LanguageModelJudge("other", ASKED[1]))
    prompts, first, second, _ = rows(5)
    network = context.abstract("other").model, Random(1).params(), None
    columns = list(zip(prompts, first, second, strict=True))
    odds = [(by_hand(network, x, y, z, ASKED[1]) - by_hand(network, x, z, y, ASKED[1])) / 2 for x, y, z in columns]
    np.testing.assert_allclose(judge(prompts, first, second), special.expit(odds), rtol=1e-3, atol=1e-4)


def test_a_rater_asks_in_the_order_in_which_it_is_given():
    affixes = {"affixes": ((" a", " b"),), "contrast": lambda prompt, last, earlier: prompt + last}
    rater, context = opened(aj.LanguageModelRater("other"), questions=ASKED[:1], **affixes)
    prompts, first, second, _ = rows(5)
    network = context.abstract("other").model, Random(1).params(), None
    want = [by_hand(network, x, y, z, ASKED[0]) for x, y, z in zip(prompts, first, second, strict=True)]
    np.testing.assert_allclose(rater(prompts, first, second, ASKED[:1] * 5), want, rtol=2e-4, atol=2e-4)


def test_what_a_rater_or_judge_lacks_is_told_before_anything_runs():
    context = Context(experiment(), None, "base", mesh())
    with pytest.raises(UserError, match=r"^base: task 'words' has no questions to ask a rater; give it one for each"):
        aj.LanguageModelRater("other").check(context)
    with pytest.raises(UserError, match=r"^base: the question of a language-model judge needs both answers"):
        aj.LanguageModelJudge("other", ASKED[0]._replace(other="")).check(context)
    with pytest.raises(UserError, match=r"^base: a question's answer: .* is 2 tokens"):
        aj.LanguageModelJudge("other", ASKED[0]._replace(other=" yes no")).check(context)


def test_the_program_is_compiled_for_the_longest_question_and_both_replies():
    """Texts of the sizes that it is planned for fit the planned length: nothing compiles again."""
    shown = few_shot(ASKED[0], FORMAT, [RatedExample("red", "one two", "three", True)] * 3)
    affixes = {"affixes": ((" a", " b"),), "contrast": lambda prompt, last, earlier: prompt + last}
    whole = aj.Experiment(task(format=FORMAT, questions=(shown,), **affixes), {"other": Random(1)})
    spec, context = aj.LanguageModelRater("other"), Context(whole, None, "other", mesh())
    (program,) = spec.programs(context, "judge", aj.JudgeSizes(batch=8, prompt=6, reply=4))
    planned = program.arguments[1].tokens.shape
    longest = rater_text(shown, FORMAT, " ".join(WORDS[:6]), " ".join(WORDS[:4]), " ".join(WORDS[4:8]))
    assert planned[0] == 8 and len(tokenizer().encode(longest)) <= planned[1] < len(tokenizer().encode(longest)) + 40


def test_few_shot_is_the_concatenation_of_answered_examples():
    question = Template(" [b]", " [m]", " [q]", " A", " B", preamble="[p]")
    examples = [RatedExample("X", "y", "z", True), RatedExample("U", "v", "w", False)]
    form = Format(before="_", end="END", stop=("END",))
    shown = few_shot(question, form, examples)
    assert rater_text(shown, form, "P", "r", "s") == (
        "[p]X [b]_y [m]_z [q] A\n\n[p]U [b]_v [m]_w [q] B\n\n[p]P [b]_r [m]_s [q]"
    )
    assert shown._replace(preamble="[p]") == question  # nothing else is changed
    for wrong in ((question, []), (question._replace(other=" A"), examples)):
        with pytest.raises(UserError, match="few_shot needs an example and a question with two answers"):
            few_shot(wrong[0], form, wrong[1])
