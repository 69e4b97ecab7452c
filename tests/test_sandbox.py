"""The sandbox: the oracle reads every reply back, values follow the latent model, the majority is a cycle."""

import dataclasses
import itertools
import re

import numpy as np
import pytest
from scipy import integrate, stats

from alignjax.errors import UserError
from alignjax.tasks import sandbox
from alignjax.tasks import sandbox_grammar as grammar
from alignjax.tasks.sandbox import World
from alignjax.tasks.task import SPLITS, is_in_split, rater_text

WORLD = World()
ASKED = "Human: How can I fix my garden?\n\nAssistant:"
SENTENCE = r"[^ ].*?[.!?](?= |$)"
SCORES = {"harmless": grammar.harmless_score, "helpful": grammar.helpful_score}


def replies_about(noun, pieces):
    """Returns reply -> (harmless, helpful, style) for every reply about a noun with this many pieces of advice."""
    openers = [(s, v) for v, group in grammar.OPENERS.items() for s in group]
    advice = [(f"For the {noun}, {s}.", *v) for v, group in grammar.ADVICE.items() for s in group]
    closers = [(s, *v) for v, group in grammar.CLOSERS.items() for s in group]
    replies = {}
    for (a, x), (c, style, y), *middle in itertools.product(openers, closers, *[advice] * pieces):
        harm, help_ = [x, y, *(m[2] for m in middle)], [m[1] for m in middle]
        text = " ".join([a, *(m[0] for m in middle), c])
        assert text not in replies
        replies[text] = (np.mean(harm), np.mean(help_), style)
    return replies


@pytest.fixture(scope="module")
def replies():
    """Every reply about the garden, with its values."""
    return replies_about("garden", 1) | replies_about("garden", 2)


def sample_readings(count, means, world=WORLD, prompt=ASKED):
    """Returns the values of ``count`` replies whose writers have these means; reply i always has the seed i."""
    texts = [sandbox.sample_reply(world, prompt, means, np.random.default_rng(i)) for i in range(count)]
    return [grammar.parse_reply(prompt, text) for text in texts]


def test_the_oracle_reads_back_every_reply_of_the_grammar(replies):
    for text, (harm, help_, style) in list(replies.items())[::7]:
        reading = dataclasses.astuple(grammar.parse_reply(ASKED, text))
        assert reading == (pytest.approx(harm), pytest.approx(help_), style)
        assert grammar.harmless_score(ASKED, text) == pytest.approx(harm)
        assert grammar.helpful_score(ASKED, text) == pytest.approx(help_)


def test_the_generator_writes_only_what_the_grammar_holds(replies):
    rng = np.random.default_rng(0)
    sampled = {sandbox.sample_reply(WORLD, ASKED, {}, rng) for _ in range(1000)}
    assert sampled <= set(replies) and len(sampled) > 500


@pytest.mark.parametrize("damage", [
    lambda s: [" ".join(s[:k]) for k in range(len(s))],
    lambda s: [" ".join(s[k:]) for k in range(1, len(s) + 1)],
    lambda s: [" ".join(s)[:-1], " ".join(s)[:-4], " ".join(s)[1:]],
    lambda s: [" ".join(p) for p in itertools.permutations(s) if p[0] != s[0] or p[-1] != s[-1]],
    lambda s: [" ".join([*s[:k], "Buy my book.", *s[k:]]) for k in range(len(s) + 1)],
    lambda s: [" ".join([*s[:-1], s[1], s[1], s[-1]])],
    lambda s: [" ".join(s) + tail for tail in (" ", "\n", " ok", ".", " Well.", "\n\nHuman:")],
    lambda s: [head + " ".join(s) for head in (" ", "\n", "ok ", "Assistant: ")],
    lambda s: ["  ".join(s), "\n".join(s), "".join(s), " ".join(s).lower()],
    lambda s: [" ".join(s).replace("garden", "moon"), " ".join(s).replace("For the", "For a")],
    lambda s: ["", " ", "no"],
])  # fmt: skip
def test_a_reply_that_the_grammar_cannot_make_scores_lowest(replies, damage):
    for text in list(replies)[:: len(replies) // 50]:
        for wrong in damage(re.findall(SENTENCE, text)):
            assert grammar.parse_reply(ASKED, wrong) is None, wrong
            assert grammar.harmless_score(ASKED, wrong) == grammar.helpful_score(ASKED, wrong) < -1


def test_advice_about_another_noun_is_unhelpful_and_keeps_its_harmlessness():
    for text, (harm, help_, style) in list(replies_about("roof", 1).items())[::11]:
        about_it = grammar.parse_reply(ASKED.replace("garden", "roof"), text)
        assert dataclasses.astuple(about_it) == (pytest.approx(harm), help_, style)
        assert dataclasses.astuple(grammar.parse_reply(ASKED, text)) == (pytest.approx(harm), -1, style)
    mixed = "Well. For the garden, make a list. For the roof, make a list. Talk soon."
    assert grammar.parse_reply(ASKED, mixed).helpful == 0


def test_only_the_last_question_of_a_dialogue_asks():
    earlier = "Human: Is it hard to sell a boat?\n\nAssistant: Well. For the boat, try a Monday. Talk soon.\n\n"
    text = "Well. For the garden, make a list. Talk soon."
    assert grammar.parse_reply(earlier + ASKED, text) == grammar.parse_reply(ASKED, text)
    assert grammar.parse_reply(earlier + ASKED, text.replace("garden", "boat")).helpful == -1


def test_every_question_is_read_for_its_noun():
    parts = itertools.product(grammar.QUESTIONS, grammar.VERBS, grammar.NOUNS, set(grammar.EXTRAS))
    for form, verb, noun, extra in parts:
        assert grammar.question_noun("Human: " + form.format(verb=verb, noun=noun, extra=extra)) == noun


def test_a_million_distinct_dialogues_counted_by_enumeration(replies):
    parts = itertools.product(grammar.QUESTIONS, grammar.VERBS, grammar.NOUNS, grammar.EXTRAS)
    questions = {form.format(verb=verb, noun=noun, extra=extra) for form, verb, noun, extra in parts}
    assert WORLD.count_dialogues() == len(questions) * len(replies) >= 10**6
    smallest = World(nouns=1, verbs=1).count_dialogues()
    assert World(nouns=2, verbs=3).count_dialogues() == 6 * smallest


def questions(text):
    """Returns every question of a prompt or document, earlier turns included."""
    return set(re.findall(r"Human: (.+?)(?:\n\nAssistant|$)", text))


def test_splits_share_no_question_and_prompts_are_distinct():
    prompts = {split: WORLD.prompts(split, 400, seed=3) for split in SPLITS}
    asked = {split: set().union(*map(questions, texts)) for split, texts in prompts.items()}
    asked["train"] |= set().union(*map(questions, sandbox.sandbox_corpus(WORLD, 3000, seed=1)))
    for a, b in itertools.combinations(SPLITS, 2):
        assert not asked[a] & asked[b]
    for texts in prompts.values():
        assert len(set(texts)) == 400 and all(text.endswith("\n\nAssistant:") for text in texts)
        two = np.mean([text.count("Human:") - 1 for text in texts])
        assert abs(two - WORLD.two_turns) < 4 * np.sqrt(WORLD.two_turns / 400)


def test_prompts_are_a_function_of_split_count_and_seed():
    assert WORLD.prompts("train", 50, 1) == WORLD.prompts("train", 50, 1)
    assert WORLD.prompts("train", 80, 1)[:50] == WORLD.prompts("train", 50, 1)
    assert WORLD.prompts("train", 50, 1) != WORLD.prompts("train", 50, 2)


def test_more_prompts_than_the_world_holds_are_refused_with_the_number():
    world = World(nouns=1, verbs=1, two_turns=0.0)
    with pytest.raises(UserError, match=r"holds only [1-9]\d? train prompts, 99 asked") as error:
        world.prompts("train", 99, 0)
    most = int(re.search(r"only (\d+)", str(error.value))[1])
    assert len(world.prompts("train", most, 0)) == most


def law(mean, sharpness):
    """P(v) for v = -1, 0, 1: proportional to exp(sharpness z v) given z ~ N(mean, 1) (2307.12950 App. N)."""

    def given(z, v):
        return np.exp(sharpness * z * v) / sum(np.exp(sharpness * z * u) for u in (-1, 0, 1)) * stats.norm.pdf(z, mean)

    return np.array([integrate.quad(given, mean - 8, mean + 8, args=(v,))[0] for v in (-1, 0, 1)])


@pytest.mark.parametrize(("mean", "sharpness"), [(0.0, 1.0), (1.0, 2.0), (-0.5, 1.0), (-1.0, 3.0)])
def test_sentence_values_follow_the_latent_model(mean, sharpness):
    world, rng = World(sharpness=sharpness), np.random.default_rng(0)
    openers, advice, closers = grammar.sentence_values()
    values = []
    for _ in range(4000):
        text = sandbox.sample_reply(world, ASKED, {"harmless": mean, "helpful": -mean}, rng)
        opener, first, *_, closer = re.findall(SENTENCE, text)
        helpful, harmless = advice[first.removeprefix("For the garden, ").removesuffix(".")]
        values.append([openers[opener], harmless, closers[closer][1], -helpful])
    for sentence in np.transpose(values):
        counts = [np.sum(sentence == v) for v in (-1, 0, 1)]
        assert stats.chisquare(counts, 4000 * law(mean, sharpness)).pvalue > 1e-3


@pytest.mark.parametrize(("own", "other"), [("harmless", "helpful"), ("helpful", "harmless")])
def test_a_mean_moves_its_own_attribute_alone(own, other):
    low, high = sample_readings(300, {own: -1.0}), sample_readings(300, {own: 1.0})
    assert [getattr(r, other) for r in low] == [getattr(r, other) for r in high]
    gains = [getattr(b, own) - getattr(a, own) for a, b in zip(low, high, strict=True)]
    assert min(gains) >= 0 and np.mean(gains) > 0.5


def test_affixes_of_the_corpus_show_in_their_own_attribute_by_half_the_gap():
    world = World(rater=0.0, two_turns=0.0)
    documents = sandbox.sandbox_corpus(world, 3000, seed=0)
    side_of = {
        f" {a}": (n, i) for n, pairs in sandbox.SANDBOX_AFFIXES.items() for pair in pairs for i, a in enumerate(pair)
    }
    groups = {}
    for document in documents:
        prompt, affix, text = re.fullmatch(r"(.*Assistant)( \(.*?\))?: (.*)\n\nHuman:", document, re.DOTALL).groups()
        groups.setdefault(side_of[affix] if affix else None, []).append(grammar.parse_reply(prompt, text))
    assert abs(1 - len(groups[None]) / 3000 - world.affixed) < 4 * np.sqrt(world.affixed * (1 - world.affixed) / 3000)
    assert set(groups) == {None, *side_of.values()}
    for key, readings in groups.items():
        for name in ("harmless", "helpful"):
            shift = world.mean_gap * (0.5 - key[1]) if key and key[0] == name else 0.0
            values = np.array([getattr(reading, name) for reading in readings])
            error = values.std() / np.sqrt(len(values))
            assert abs(values.mean() - law(shift, world.sharpness) @ [-1, 0, 1]) < 4 * error


@pytest.mark.parametrize("attribute", ["harmless", "helpful"])
def test_contrast_labels_are_mostly_right_and_more_so_with_the_gap(attribute):
    def accuracy(gap):
        plus, minus = (sample_readings(1500, {attribute: sign * gap / 2}) for sign in (1, -1))
        minus = minus[1:] + minus[:1]  # another draw than its partner's
        wins = [np.sign(getattr(a, attribute) - getattr(b, attribute)) for a, b in zip(plus, minus, strict=True)]
        return 0.5 + 0.5 * np.mean(wins)

    curve = [accuracy(gap) for gap in (0.0, 0.8, 1.6, 3.2, 6.4)]
    assert abs(curve[0] - 0.5) < 0.05 and curve[-1] > 0.97
    assert np.all(np.diff(curve) > 0.01)
    assert 0.75 < accuracy(WORLD.mean_gap) < 0.97


def test_the_corpus_asks_no_held_out_question():
    for document in sandbox.sandbox_corpus(World(two_turns=0.0), 500, seed=1):
        asked = re.match(r"Human: (.*?)\n\nAssistant", document)[1]
        assert is_in_split(asked, "train") and not any(is_in_split(asked, split) for split in SPLITS[1:])


def test_a_rater_of_the_corpus_reads_the_tasks_question():
    tasks = {name: sandbox.sandbox_task(attribute=name) for name in SCORES}
    form = r"(.*Assistant:) (.*)\n\nHuman: Or: (.*)\n\nHuman: More (\w+):( first| second)"
    for document in sandbox.sandbox_corpus(World(rater=1.0), 50, seed=4):
        prompt, first, second, attribute, answer = re.fullmatch(form, document, re.DOTALL).groups()
        task = tasks[attribute]
        assert len(task.questions) == len(task.affixes)
        for question in task.questions:
            assert rater_text(question, task.format, prompt, first, second) + answer == document
            assert answer in (question.answer, question.other)


@pytest.mark.parametrize("error", [0.1, 0.3])
def test_raters_err_at_the_error_rate_and_answer_ties_by_a_coin(error):
    outcomes = {True: [], False: []}
    form = r"(.*Assistant:) (.*)\n\nHuman: Or: (.*)\n\nHuman: More (\w+): (first|second)"
    for document in sandbox.sandbox_corpus(World(rater=1.0, rater_error=error), 3000, seed=2):
        prompt, first, second, attribute, answer = re.fullmatch(form, document, re.DOTALL).groups()
        gap = SCORES[attribute](prompt, first) - SCORES[attribute](prompt, second)
        outcomes[gap == 0].append(answer == ("second" if gap > 0 else "first"))
    for ties, rate in ((False, error), (True, 0.5)):
        assert abs(np.mean(outcomes[ties]) - rate) < 4 * np.sqrt(rate * (1 - rate) / len(outcomes[ties]))


def test_every_oracle_is_antisymmetric_even_on_ill_formed_replies(replies):
    texts = [*list(replies)[:: len(replies) // 25], "", "Well.", "For the roof, try a Monday."]
    for attribute in SCORES:
        for oracle in sandbox.sandbox_task(attribute=attribute).oracles.values():
            for a, b in itertools.product(texts, repeat=2):
                assert oracle(ASKED, a, b) + oracle(ASKED, b, a) == 1
                assert a != b or oracle(ASKED, a, b) == 0.5


@pytest.mark.parametrize("attribute", ["harmless", "helpful"])
def test_the_truth_of_the_task_prefers_the_higher_score(replies, attribute):
    task, texts = sandbox.sandbox_task(attribute=attribute), [*list(replies)[:: len(replies) // 25], ""]
    truth, mean = next(iter(task.oracles.values())), {"harmless": 0, "helpful": 1}[attribute]
    for a, b in itertools.combinations(texts, 2):
        gap = replies.get(a, (-2, -2))[mean] - replies.get(b, (-2, -2))[mean]
        assert truth(ASKED, a, b) == (0.5 if abs(gap) < 1e-12 else float(gap > 0))


def test_annotators_are_three_transitive_types_whose_majority_is_a_cycle(replies):
    one_of = {style: text for text, (_, _, style) in replies.items()}
    types = [("formal", "warm", "playful"), ("warm", "playful", "formal"), ("playful", "formal", "warm")]
    for a, b in itertools.permutations(grammar.STYLES, 2):
        population = np.mean([order.index(a) < order.index(b) for order in types])  # linear orders: transitive
        assert grammar.population_oracle(ASKED, one_of[a], one_of[b]) == pytest.approx(population, abs=1e-15)
        assert grammar.population_oracle(ASKED, one_of[a], "junk") == 1
    for a, b in (("formal", "warm"), ("warm", "playful"), ("playful", "formal")):
        assert grammar.population_oracle(ASKED, one_of[a], one_of[b]) == pytest.approx(2 / 3, abs=1e-15)


def test_an_unknown_principle_is_refused():
    with pytest.raises(UserError, match="harmless, helpful"):
        sandbox.sandbox_task(attribute="honest")


def test_the_corpus_of_the_task_follows_its_source():
    task = sandbox.sandbox_task()
    world = World(nouns=1, verbs=1)
    assert task.corpus(20, 3) == sandbox.sandbox_corpus(WORLD, 20, 3)
    assert dataclasses.replace(task, source=world).corpus(20, 3) == sandbox.sandbox_corpus(world, 20, 3)
