"""The world of posts: what annotators read, and the cycle of their majority."""

import itertools
from collections import Counter

import numpy as np
import pytest

from alignjax.errors import UserError
from alignjax.games import game as games
from alignjax.games import solve
from alignjax.tasks.post_grammar import PEOPLE, PostContent, SummaryReading, read_post, read_summary, write_summary
from alignjax.tasks.post_world import (
    INVALID,
    MASSES,
    OTHER,
    STYLES,
    PostWorld,
    annotators_prefer,
    post_corpus,
    post_summaries,
    post_task,
    style_of,
    styled_summary,
)
from alignjax.tasks.summary import PLAIN_QUERY, T5_QUERY, TLDR_QUERY

POST = (
    "SUBREDDIT: r/family\n\nTITLE: About my boss\n\nPOST: Then my boss lied. I think my boss fell. "
    "What now? My boss quit.\n\nTL;DR:"
)
READ = PostContent("boss", ("lied", "quit"), ("fell",))


def prefer(first, second):
    return annotators_prefer(MASSES, POST, f"boss {first}", f"boss {second}")


def canonical_summaries(post):
    """Every summary that leaves out, tells or hedges each fact of the post."""
    facts = [*post.sure, *post.doubtful]
    for choice in itertools.product(("omit", "tell", "hedge"), repeat=len(facts)):
        claims = [(fact, how == "hedge") for fact, how in zip(facts, choice, strict=True) if how != "omit"]
        if claims:
            yield write_summary(post.who, claims)


@pytest.mark.parametrize("query", [TLDR_QUERY, T5_QUERY, PLAIN_QUERY])
def test_a_post_is_read_back(query):
    assert read_post(POST) == READ
    for prompt in PostWorld(query=query, doubtful=2).prompts("train", 40, 0):
        post = read_post(prompt)
        assert len(post.sure) == 1 and len(post.doubtful) == 2 and post.who in prompt


@pytest.mark.parametrize(
    ("summary", "reading"),
    [
        ("boss lied", SummaryReading(1, 2, 0)),
        ("boss quit, lied", SummaryReading(2, 3, 0)),
        ("boss lied, lied", SummaryReading(1, 3, 0)),  # told once
        ("boss fell", SummaryReading(1, 2, 1)),  # doubtful
        ("boss maybe fell", SummaryReading(1, 3, 0)),
        ("boss maybe lied", SummaryReading(1, 3, 0)),  # hedging what is sure is longer, and not wrong
        ("boss lied, won", SummaryReading(1, 3, 1)),  # invented
        ("boss lied, maybe won", SummaryReading(1, 4, 1)),  # hedged, and still not in the post
        ("boss maybe fell, fell", SummaryReading(1, 4, 1)),
        ("uncle lied", None),
        ("boss ate", None),
        ("boss", None),
        ("boss lied.", None),
        ("boss maybe", None),
        ("", None),
    ],
)
def test_a_summary_is_read(summary, reading):
    assert read_summary(READ, summary) == reading


def test_each_annotator_ranks_by_its_own_criteria():
    complete, brief, faithful = np.eye(3)

    def first_wins(masses, first, second):
        return annotators_prefer(masses, POST, first, second)

    bold, careful, terse = (styled_summary(READ, style) for style in STYLES)
    assert [first_wins(complete, *pair) for pair in ((bold, careful), (careful, terse), (bold, terse))] == [1, 1, 1]
    assert [first_wins(brief, *pair) for pair in ((terse, bold), (bold, careful), (terse, careful))] == [1, 1, 1]
    assert [first_wins(faithful, *pair) for pair in ((careful, terse), (terse, bold), (careful, bold))] == [1, 1, 1]


def test_the_majority_is_a_cycle_with_links_of_the_masses():
    complete, brief, faithful = MASSES
    bold, careful, terse = (styled_summary(READ, style) for style in STYLES)
    for first, second, link in (
        (bold, careful, complete + brief),
        (careful, terse, complete + faithful),
        (terse, bold, brief + faithful),
    ):
        assert annotators_prefer(MASSES, POST, first, second) == pytest.approx(link) and link > 0.5


def test_preferences_are_antisymmetric_and_invalid_summaries_lose():
    texts = [*canonical_summaries(READ), "", "nonsense"]
    p = np.array([[annotators_prefer(MASSES, POST, a, b) for b in texts] for a in texts])
    np.testing.assert_allclose(p + p.T, 1, atol=1e-12)
    assert np.all(p[:-2, -2:] == 1) and np.all(p[-2:, -2:] == 0.5)


@pytest.mark.parametrize("world", [PostWorld(facts=2), PostWorld(facts=3), PostWorld(facts=4)])
def test_the_nash_policy_over_every_summary_plays_the_three_styles_alone(world):
    """With links 1/2 + a, 1/2 + b, 1/2 + c of the cycle it is proportional to (b, c, a)."""
    prompt = world.prompts("train", 1, 0)[0]
    post = read_post(prompt)
    styled = [styled_summary(post, style) for style in STYLES]
    texts = [*styled, *(text for text in canonical_summaries(post) if style_of(prompt, text) == OTHER)]
    p = [[annotators_prefer(MASSES, prompt, a, b) for b in texts] for a in texts]
    masses = solve.nash(games.from_matrix(p)).policy[0]
    a, b, c = (p[i][j] - 0.5 for i, j in ((0, 1), (1, 2), (2, 0)))
    np.testing.assert_allclose(masses[:3], np.array([b, c, a]) / (a + b + c), atol=1e-9)
    assert masses[3:].max() < 1e-9


def test_styles_are_what_annotators_see():
    assert [style_of(POST, styled_summary(READ, style)) for style in STYLES] == list(STYLES)
    assert style_of(POST, "boss quit, fell, lied") == "bold"
    assert style_of(POST, "boss quit") == OTHER
    assert style_of(POST, "uncle quit") == INVALID


def test_the_corpus_has_the_writers_that_the_world_says():
    documents = post_corpus(PostWorld(sloppy=0.0), 1500, 0)
    styles = Counter(style_of(*document.split("TL;DR: ")) for document in documents)
    assert set(styles) == set(STYLES)
    assert min(styles.values()) > 440
    sloppy = Counter(style_of(*document.split("TL;DR: ")) for document in post_corpus(PostWorld(sloppy=1.0), 500, 0))
    assert sloppy == {OTHER: 500}


def test_every_annotator_prefers_a_summary_to_itself_with_a_fact_told_twice():
    for seed in range(30):
        (plain,), (sloppy,) = (post_summaries(PostWorld(sloppy=share), 1, seed) for share in (0.0, 1.0))
        assert plain[0] == sloppy[0] and sloppy[1].startswith(plain[1] + ", ")
        assert annotators_prefer((0.4, 0.3, 0.3), *plain, sloppy[1]) == pytest.approx(1)


def test_prompts_are_distinct_repeatable_and_split():
    world = PostWorld()
    splits = {split: world.prompts(split, 200, 3) for split in ("train", "validation", "test")}
    assert all(len(set(prompts)) == 200 for prompts in splits.values())
    assert not set(splits["train"]) & set(splits["test"]) | set(splits["validation"]) & set(splits["test"])
    assert world.prompts("test", 200, 3) == splits["test"] != world.prompts("test", 200, 4)
    assert all(read_post(x).who in PEOPLE for x in splits["train"])
    documents = {document.split("TL;DR")[0] for document in post_corpus(world, 500, 0)}
    assert not documents & {prompt.split("TL;DR")[0] for prompt in splits["test"]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"people": 0}, "people"),
        ({"facts": 1}, "facts"),
        ({"facts": 9, "known": 9}, "facts"),
        ({"doubtful": 3}, "doubtful"),
        ({"sloppy": 1.5}, "sloppy"),
        ({"query": "no place"}, "query"),
    ],
)
def test_a_world_out_of_range_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        PostWorld(**settings)


@pytest.mark.parametrize("masses", [(0.5, 0.5, 0.5), (0.5, 0.5), (1.5, -0.5, 0.0)])
def test_annotators_that_are_no_three_shares_are_refused(masses):
    with pytest.raises(UserError, match=r"masses=.* must be three that are not negative and sum to 1"):
        post_task(masses=masses)


def test_the_oracle_is_the_annotators_of_the_given_masses():
    bold, terse = (styled_summary(READ, style) for style in ("bold", "terse"))
    assert post_task(masses=(0.6, 0.3, 0.1)).oracles["annotators"](POST, bold, terse) == pytest.approx(0.6)
    assert post_task().oracles["annotators"](POST, bold, terse) == pytest.approx(MASSES[0])


def test_a_world_that_is_too_small_and_an_unknown_split_are_refused():
    with pytest.raises(UserError, match="enlarge"):
        PostWorld(people=1, known=3, facts=2).prompts("test", 3000, 0)
    with pytest.raises(UserError, match="no split 'dev'"):
        post_task().source.prompts("dev", 1, 0)
