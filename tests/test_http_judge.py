"""The judge that asks a chat model: both orders, what an answer says, figures, and its place in an experiment."""

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import alignjax as aj
from alignjax.cli import main
from alignjax.distributed import sharding
from alignjax.errors import RunAgain, UserError
from alignjax.pipeline.config import load
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.stages import Label, Tournament, Writing
from alignjax.pipeline.stages import tournament as tournament_stage
from alignjax.preferences import judges
from alignjax.preferences.http_answers import Answer, request_digest
from alignjax.preferences.http_judge import (
    FIGURES,
    Form,
    Prices,
    Question,
    QuestionJudge,
    choice_probability,
    choice_question,
    messages,
    parse_answer,
    parse_choice,
    parse_however,
)
from alignjax.reporting import tables
from alignjax.sampling.generate import Reply
from tests.chat_server import said, serve

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.py"
PLAIN = Question("", "{prompt}|{first}|{second}")
JUDGE = aj.HTTPJudge("http://127.0.0.1:9/v1", "m", PLAIN)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    """Requests to this machine go to this machine."""
    monkeypatch.setenv("NO_PROXY", "*")


class Asked:
    """An Ask that answers by (prompt, first, second) -> text or Answer, and records what it was asked."""

    def __init__(self, answer):
        self.answer, self.shown, self.kept = answer, [], {}

    def __call__(self, bodies):
        return [self.one(body) for body in bodies]

    def one(self, body):
        shown = tuple(body["messages"][-1]["content"].split("|"))
        self.shown.append(shown)
        found = self.answer(*shown)
        answer = found if isinstance(found, Answer) else Answer(found, [], 10, 2, tries=1)
        return self.kept.setdefault(request_digest(body), answer)


def judge_of(answer, *, both_orders=True, read=None, prices=None):
    """Returns a judge over such an Ask, and the Ask."""
    asked = Asked(answer)
    read = read or (lambda answer: parse_answer(parse_choice, answer))
    return QuestionJudge(asked, Form(PLAIN, {"model": "m"}, read, both_orders), prices), asked


def figures(judge):
    """Returns the judge's figures of all its calls so far."""
    return judges.judge_figures(judge, [judges.take_counts(judge)])


def longer(prompt, first, second):
    return "(A)" if len(first) > len(second) else "(B)"


# Orders


def test_each_pair_is_shown_in_both_orders():
    judge, asked = judge_of(longer)
    p = judge(["x", "y"], ["long", "a"], ["b", "short"])
    np.testing.assert_array_equal(p, [1.0, 0.0])
    assert sorted(asked.shown) == [
        ("x", "b", "long"), ("x", "long", "b"), ("y", "a", "short"), ("y", "short", "a")
    ]  # fmt: skip
    assert figures(judge) == {
        "questions": 4, "unparsed": 0, "order_disagreement": 0.0, "first_shown": 0.5, "prompt_tokens": 40,
        "completion_tokens": 8, "requests": 4, "retries": 0, "cache_hits": 0,
    }  # fmt: skip


def test_in_one_order_the_first_reply_is_shown_first():
    judge, asked = judge_of(longer, both_orders=False)
    np.testing.assert_array_equal(judge(["x", "y"], ["long", "a"], ["b", "short"]), [1.0, 0.0])
    assert asked.shown == [("x", "long", "b"), ("y", "a", "short")]
    assert figures(judge)["order_disagreement"] is None


@pytest.mark.parametrize(("letter", "value"), [("(A)", 1.0), ("(B)", 0.0)])
def test_a_model_that_always_says_one_letter_says_nothing_in_both_orders(letter, value):
    texts = [[f"{name}{i}" for i in range(5)] for name in ("x", "y", "z")]
    both, _ = judge_of(lambda *_: letter)
    np.testing.assert_array_equal(both(*texts), np.full(5, 0.5))
    assert figures(both)["order_disagreement"] == 1.0
    one, _ = judge_of(lambda *_: letter, both_orders=False)
    np.testing.assert_array_equal(one(*texts), np.full(5, value))
    np.testing.assert_array_equal(one(texts[0], texts[2], texts[1]), np.full(5, value))
    assert figures(one)["first_shown"] == value


def test_some_orders_disagree_and_the_place_is_counted():
    """The model knows y0 and y1 and says the first of the other two pairs."""
    judge, _ = judge_of(lambda x, y, z: "A" if x in ("2", "3") or y.startswith("y") else "B")
    np.testing.assert_array_equal(judge(list("0123"), ["y"] * 4, ["z"] * 4), [1, 1, 0.5, 0.5])
    found = figures(judge)
    assert (found["order_disagreement"], found["first_shown"]) == (0.5, 0.75)


def random_probability(rng):
    """Returns an Ask's answer whose log-probs are random, a pure function of what is shown."""
    kept = {}

    def answer(*shown):
        a, b = kept.setdefault(shown, np.log(rng.dirichlet([1, 1, 1]))[:2])
        return Answer("A", [["A", [["A", float(a)], ["B", float(b)]]]], 1, 1, 1)

    return answer, kept


def test_probabilities_are_the_mean_over_both_orders_and_exactly_antisymmetric():
    rng = np.random.default_rng(0)
    answer, kept = random_probability(rng)
    judge, asked = judge_of(answer, read=choice_probability)
    texts = [[f"{name}{i}" for i in range(300)] for name in ("x", "y", "z")]
    p = judge(*texts)
    assert np.all(p + judge(texts[0], texts[2], texts[1]) == 1.0)
    assert len(set(asked.shown)) == 600  # the exchanged pairs are the same questions

    def says(x, y, z):
        a, b = kept[x, y, z]
        return np.exp(a) / (np.exp(a) + np.exp(b))

    want = [(says(x, y, z) + 1 - says(x, z, y)) / 2 for x, y, z in zip(*texts, strict=True)]
    np.testing.assert_allclose(p, want, atol=1e-12)
    assert np.ptp(p) > 0.5


def test_empty_and_equal_replies_are_decided_without_asking():
    judge, asked = judge_of(lambda *_: "(A)", both_orders=False)
    p = judge(["x"] * 5, ["", "some", "", "same", "y"], ["some", "", "", "same", "z"])
    np.testing.assert_array_equal(p, [0, 1, 0.5, 0.5, 1])
    assert asked.shown == [("x", "y", "z")]
    silent, asked = judge_of(lambda *_: "(A)")
    np.testing.assert_array_equal(silent(["x"], [""], ["y"]), [0.0])
    assert asked.shown == [] and figures(silent)["first_shown"] is None


# What an answer says


SAYS = [
    ("(A)", 1.0), ("(B)", 0.0), (" (B) is kinder than (A).", 0.0), ("Reply (A) it is", 1.0), ("[[B]]", 0.0),
    ("[A]", 1.0), ("Final: [[C]]", 0.5), ("A", 1.0), ("B.", 0.0), (" A\n\nIt is kind.", 1.0), ("**B**", 0.0),
    ("**B**: shorter", 0.0), ('"A"', 1.0), ("A is better", 1.0), ("B because it helps", 0.0), ("A - kinder", 1.0),
    ("B) it helps", 0.0), ("The answer is B.", 0.0), ("My final verdict: **A**", 1.0), ("I prefer response B", 0.0),
    ("The better answer is A because it helps", 1.0), ("Response A is much better", 1.0),
    ("Both help. Option B wins", 0.0),
    ("They differ.\n\nB", 0.0), ("They differ.\n**A**.\n", 1.0), ("tie", 0.5), ("It's a tie.", 0.5),
    ("<think>(A) or (B)? A.</think>\n(B)", 0.0),
]  # fmt: skip
SAYS_NOTHING = [
    "", "A good reply would differ.", "Neither.", "a", "Both are bad; a (C) is missing.",
    "The answer A lacks is not here",
    "Band A-list", "I cannot compare these.", "ABBA", "<think>(A)</think>", "The answer: a long one",
]  # fmt: skip


@pytest.mark.parametrize(("text", "value"), SAYS)
def test_the_common_forms_of_a_verdict_are_read(text, value):
    assert parse_choice(text) == value
    mirrored = text.translate(str.maketrans("AB", "BA"))
    if "It" not in text and "Both" not in text:
        assert parse_choice(mirrored) == 1 - value


@pytest.mark.parametrize("text", SAYS_NOTHING)
def test_what_is_no_verdict_is_not_read(text):
    assert parse_choice(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(A), because", 1.0),
        ("(B)", 0.0),
        ("Response (B) is kinder than (A).", 0.0),
        ("Both fail. However, (B) is less bad than (A).", 0.0),
        ("(B) has merits? No.", 0.0),
        ("Neither (A) nor (B). However, (A) is better than (B).", 1.0),
        ("Hm. However, (A) is good; (B) too.", None),
        ("Hm. However, neither.", None),
        ("I choose (A).", None),  # no "However"
        (" (A)", None),
        ("", None),
    ],
)
def test_the_rule_of_the_released_code(text, value):
    assert parse_however(text) == value


def logged(*positions):
    return Answer(
        "".join(token for token, _ in positions), [[t, [list(p) for p in pairs]] for t, pairs in positions], 1, 1, 1
    )


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        (logged(("A", [("A", -0.3), ("B", -1.3), ("C", -0.1)])), 1 / (1 + np.exp(-1.0))),
        (
            logged(("(", [("(", -0.1), ("A", -9.0)]), ("B", [("B", -0.2), ("A", -2.2)]), (")", [])),
            1 / (1 + np.exp(2.0)),
        ),
        (logged((" A", [(" A", -1.0), ("A", -1.0), (" B", -1.0)])), 2 / 3),  # each form of a letter counts
        (logged(("(B", [("(B", -0.1)])), 0.0),  # A is not among the likeliest
        (logged(("A", [("A", -800.0), ("B", -801.0)])), 1 / (1 + np.exp(-1.0))),
        (logged(("Hm", [("Hm", -0.1), ("A", -1.0)])), None),
        (logged(("A", [("A", float("-inf")), ("B", float("-inf"))])), None),
        (Answer("", [], 1, 1, 1), None),
    ],
)
def test_the_probability_is_the_softmax_of_the_letters_log_probs(answer, value):
    found = choice_probability(answer)
    assert found is value is None or found == pytest.approx(value, abs=1e-12)


def test_an_endpoint_without_log_probs_is_refused(tmp_path):
    """One answer without them cannot be read; when all lack them, the setting is wrong."""
    logged, bare = said("A", [("A", [("A", -0.1), ("B", -2.1)])]), said("A")
    for reply, refused in (((logged, bare), False), ((bare, bare), True)):
        with serve(lambda number, body, reply=reply: reply[number]) as chat:
            judge = replace(JUDGE, url=chat.url, top_logprobs=5, limits=aj.Limits(concurrency=1))
            opened = judge.open(context(quickstart(), "table", tmp_path / str(refused)), (), None)
            if refused:
                with pytest.raises(
                    UserError, match=rf"table: the HTTP judge 'm': {chat.url} returns no top_logprobs; "
                ):
                    opened(["x"], ["y"], ["z"])
            else:
                p = opened(["x"], ["y"], ["z"])
                assert p == pytest.approx([0.5 + 0.5 * (1 / (1 + np.exp(-2)) - 0.5)])
                assert figures(opened)["unparsed"] == 1
        assert all((body["logprobs"], body["top_logprobs"]) == (True, 5) for body in chat.bodies)


def test_an_answer_that_cannot_be_read_counts_a_half_and_is_counted():
    judge, _ = judge_of(lambda x, y, z: "dunno" if x == "never" or (x == "once" and y == "z") else longer(x, y, z))
    p = judge(["never", "once", "fine"], ["yy", "yy", "yy"], ["z", "z", "z"])
    np.testing.assert_array_equal(p, [0.5, 0.75, 1.0])
    found = figures(judge)
    assert (found["questions"], found["unparsed"]) == (6, 3)
    assert found["first_shown"] == pytest.approx(2 / 3) and found["order_disagreement"] == 0.0


# What is asked


def test_texts_are_put_in_their_places_as_they_are():
    texts = (r"{second} \1 \g<0>", "{prompt} {first} {", "}{0} {second}")
    question = Question("be fair", "<{prompt}> [{first}] ({second}) {first} {other}")
    assert messages(question, *texts) == [
        {"role": "system", "content": "be fair"},
        {"role": "user", "content": f"<{texts[0]}> [{texts[1]}] ({texts[2]}) {texts[1]} {{other}}"},
    ]
    assert messages(Question("", "{prompt}{first}{second}"), "a", "b", "c") == [{"role": "user", "content": "abc"}]


def test_a_question_about_a_choice_shows_everything_once_in_order():
    (_, user) = messages(choice_question("Which {one}?"), "<x>", "<y>", "<z>")
    text = user["content"]
    assert [text.count(part) for part in ("<x>", "(A):\n<y>", "(B):\n<z>", "Which {one}?")] == [1, 1, 1, 1]
    assert text.index("<x>") < text.index("<y>") < text.index("<z>") < text.index("Which")


def test_the_tokens_of_a_question_are_counted_once_and_cost_what_the_prices_say():
    judge, asked = judge_of(longer, prices=Prices(prompt=2.0, completion=10.0))
    for _ in range(3):
        judge(["x"], ["long"], ["b"])
    judge(["x"], ["b"], ["long"])
    assert len(asked.shown) == 8
    found = figures(judge)
    assert (found["questions"], found["prompt_tokens"], found["completion_tokens"]) == (8, 20, 4)
    assert found["cost"] == pytest.approx((20 * 2.0 + 4 * 10.0) / 1e6, rel=1e-12)
    assert list(found) == list(FIGURES)
    assert judges.take_counts(judge) == {}


def test_tries_are_counted_as_requests_retries_and_answers_on_disk():
    tries = {"a": 3, "b": 0, "c": 1}
    judge, _ = judge_of(lambda x, y, z: Answer("A", [], 1, 1, tries[x]), both_orders=False)
    judge(list("abc"), ["y"] * 3, ["z"] * 3)
    found = figures(judge)
    assert (found["requests"], found["retries"], found["cache_hits"]) == (4, 2, 1)


def test_judges_that_count_nothing_have_no_figures():
    oracle = judges.oracle_judge(lambda *_: 1.0)
    assert judges.take_counts(oracle) == judges.take_counts(None) == {}
    assert judges.judge_figures(oracle, [{}]) == judges.judge_figures(None, []) == {}


# In an experiment


def quickstart(**stages):
    return load(QUICKSTART, {"small": "True"}).with_stages(**stages)


def context(experiment, name, workdir=None):
    return Context(experiment, workdir, name, sharding.make_mesh(experiment.mesh))


def table_by(judge, **changes):
    return replace(load(QUICKSTART, {"small": "True"}).stages["table"], judges={"chat": judge}, **changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "localhost:8000"}, "is not http"),
        ({"url": "http://me:word@host/v1"}, "holds a user or password"),
        ({"question": Question("", "{prompt} {first}")}, "has no place {second}"),
        ({"question": Question("{prompt}", "{first} {second}")}, "has no place {prompt}"),
        ({"question": "Which is kinder?"}, "the question is a str; make it with choice_question"),
        ({"key_variable": "NO_SUCH_KEY"}, "environment variable NO_SUCH_KEY is not set"),
        ({"model": ""}, "model is empty"),
        ({"options": {"stream": True}}, "options cannot hold 'stream'"),
        ({"options": {"model": "n"}}, "options cannot hold 'model'"),
        ({"options": {"seed": object}}, "is not JSON"),
        ({"options": {"temperature": float("nan")}}, "is not JSON"),
    ],
)
def test_what_is_known_to_be_wrong_is_refused_before_anything_runs(change, words):
    wrong = replace(JUDGE, **change)
    label = replace(load(QUICKSTART, {}).stages["pairs"], method=aj.Judged(wrong))
    experiment = quickstart(table=table_by(wrong), pairs=label)
    for name in ("table", "pairs"):
        with pytest.raises(UserError) as error:
            experiment.stages[name].check(context(experiment, name))
        message = str(error.value)
        assert message.startswith(f"{name}: the HTTP judge {wrong.model!r}: ") and words in message
        assert "\n" not in message and "word@" not in message


@pytest.mark.parametrize("change", [{"max_tokens": 0}, {"top_logprobs": 21}, {"top_logprobs": -1}])
def test_fields_have_a_range(change):
    with pytest.raises(UserError, match=rf"HTTPJudge\.{next(iter(change))}="):
        replace(JUDGE, **change)


def test_a_wrong_url_is_answered_by_the_command_line_in_one_line(tmp_path, capfd):
    file = tmp_path / "own.py"
    file.write_text(
        "from dataclasses import replace\nimport alignjax as aj\n\n\ndef get_config():\n"
        f"    q = aj.load({str(QUICKSTART)!r}, {{'small': 'True'}})\n"
        "    judge = aj.HTTPJudge('ftp://host/v1', 'm', aj.choice_question('Which is kinder?'))\n"
        "    return q.with_stages(table=replace(q.stages['table'], judges={'chat': judge}))\n"
    )
    assert main(["run", str(file), "--workdir", str(tmp_path / "w")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "table: the HTTP judge 'm': the url 'ftp://host/v1' is not http" in lines[0]
    assert not (tmp_path / "w").exists()


def test_where_and_how_hard_it_is_asked_changes_no_fingerprint_and_what_is_asked_does():
    def print_of(**changes):
        experiment = quickstart(table=table_by(replace(JUDGE, **changes)))
        return context(experiment, "table").fingerprint("table")

    same = ({"url": "http://elsewhere/v1"}, {"limits": aj.Limits(concurrency=2)}, {"key_variable": "K"},
            {"prices": Prices(1.0, 2.0)})  # fmt: skip
    assert {print_of(**change) for change in ({}, *same)} == {print_of()}
    others = ({"model": "n"}, {"question": choice_question("?")}, {"parse": parse_however}, {"top_logprobs": 5},
              {"both_orders": False}, {"max_tokens": 5}, {"options": {"seed": 1}})  # fmt: skip
    assert len({print_of(**change) for change in ({}, *others)}) == 1 + len(others)


def test_a_request_has_the_settings_of_the_judge():
    assert JUDGE.settings() == {"model": "m", "temperature": 0, "max_tokens": 64}
    other = replace(
        JUDGE, top_logprobs=5, options={"max_tokens": None, "max_completion_tokens": 9, "temperature": None}
    )
    assert other.settings() == {"model": "m", "logprobs": True, "top_logprobs": 5, "max_completion_tokens": 9}


def test_a_judge_that_labelled_the_pairs_is_refused_as_the_judge_of_the_table():
    q = quickstart()
    rated = replace(q.stages["pairs"], method=aj.Judged(JUDGE))
    again = replace(JUDGE, url=f"{JUDGE.url}/", question=choice_question("?"))
    elsewhere, other = replace(JUDGE, url="http://other/v1"), replace(JUDGE, model="other")  # one model, wherever it is
    for judge, words in ((JUDGE, "was taught"), (again, "was taught"), (elsewhere, "was taught"), (other, None)):
        table = table_by(judge, policies={"nash_md": "nash_md"})
        experiment = q.with_stages(pairs=rated, table=table)
        if words is None:
            table.check(context(experiment, "table"))
        else:
            with pytest.raises(UserError, match=words):
                table.check(context(experiment, "table"))


REPLIES = {
    "base": ["one", "three", "", "same"],
    "nash_md": ["seven", "two", "some", "same"],
    "self_play": ["a", "bb", "ccc", "dddd"],
}


def chat_longer(number, body):
    """A model that prefers the longer reply; it says nothing about "two"."""
    _, first, second = body["messages"][-1]["content"].split("|")
    return said("hm" if "two" in (first, second) else longer("", first, second), usage=(len(first), 1))


@pytest.fixture
def tournament(monkeypatch):
    """Makes tournaments judge ``REPLIES``, without a model."""
    written = {
        n: {
            "text": [f" {x}\n\nHuman:" for x in t], "length": list(map(len, t)), "kl": [0.0] * 4,
            "reference_logp": [-1.0] * 4,
        }
        for n, t in REPLIES.items()
    }  # fmt: skip
    monkeypatch.setattr(Tournament, "write", lambda *_: iter(written.items()))
    monkeypatch.setattr(
        tournament_stage, "fitting_prompts", lambda *arguments: (list("wxyz"), {"prompts": 4, "too_long": 0})
    )


def test_a_tournament_writes_and_shows_the_judge_s_figures_and_asks_nothing_twice(tournament, tmp_path):
    with serve(chat_longer) as chat:
        judge = replace(JUDGE, url=chat.url, prices=Prices(1e6, 0.0), limits=aj.Limits(concurrency=2))
        experiment = quickstart(table=table_by(judge))
        place = context(experiment, "table", tmp_path)
        place.folder.mkdir()
        assert experiment.stages["table"].run(place, ())["prompts"] == 4
        (first,) = json.loads((place.folder / "win_rates.json").read_text())
        asked = len(chat.bodies)
        experiment.stages["table"].run(place, ())
        (second,) = json.loads((place.folder / "win_rates.json").read_text())
    # base against nash_md: (one, seven), (three, two) unread, ("", some) unasked, (same, same) unasked
    assert first["win_rate"][0][1] == pytest.approx((0 + 0.5 + 0 + 0.5) / 4)
    # "same" against "dddd" stands in two of the 9 pairs that are asked, of which 2 are unread
    assert len(chat.bodies) == asked == first["judge_figures"]["requests"] == first["judge_figures"]["questions"] - 2
    assert first["judge_figures"]["unparsed"] == 4 and first["judge_figures"]["cost"] > 0
    assert second["judge_figures"] == {**first["judge_figures"], "requests": 0, "retries": 0, "cache_hits": asked}
    assert {name for name in second if second[name] != first[name]} == {"judge_figures"}
    line = next(line for line in tables.win_rate_table(first).splitlines() if line.startswith("Of the judge:"))
    assert f"questions {asked + 2}; unparsed 4; order disagreement 0.2857; " in line
    assert f"the model m at {chat.url}, asked in both orders" in first["judge_description"]


def test_a_table_without_figures_has_no_line_of_them(tournament, tmp_path):
    experiment = quickstart(table=replace(table_by(JUDGE), judges={"oracle": aj.Oracle("oracle")}))
    place = context(experiment, "table", tmp_path)
    place.folder.mkdir()
    experiment.stages["table"].run(place, ())
    (table,) = json.loads((place.folder / "win_rates.json").read_text())
    assert table["judge_figures"] == {} and "Of the judge" not in tables.win_rate_table(table)


@pytest.fixture
def label(monkeypatch):
    """Returns (judge) -> an experiment with a Label stage whose replies are drawn without a model."""

    def generate(prompts, numbers, attempt):
        return [
            Reply(f"{'yes ' * (1 + (7 * n + 2 * (attempt // 5)) % 5)}{n} {attempt}\n\nHuman:", 1, 0.0) for n in numbers
        ]

    monkeypatch.setattr(Writing, "generator", lambda *_: generate)
    monkeypatch.setattr(Context, "load", lambda *_: SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text: [0])))
    monkeypatch.setattr("alignjax.pipeline.stages.label.function_of", lambda *_: None)
    monkeypatch.setattr(
        "alignjax.pipeline.stages.label.data.write_pairs", lambda *_: None
    )  # slow, and tested elsewhere
    writing = Writing(max_new_tokens=8, buckets=(32,), batch=2)

    def make(judge):
        return quickstart(pairs=Label(aj.Judged(judge), "train", 40, writing, generator="base"))

    return make


def test_labels_by_a_chat_model_have_its_figures_also_when_they_were_made_in_two_runs(label, tmp_path):
    def figures_of(folder, reply, **limits):
        with serve(reply) as chat:
            judge = replace(JUDGE, url=chat.url, limits=aj.Limits(concurrency=1, **limits))
            experiment = label(judge)
            place = context(experiment, "pairs", tmp_path / folder)
            place.folder.mkdir(parents=True, exist_ok=True)
            return experiment.stages["pairs"].run(place, ()), len(chat.bodies)

    whole, asked = figures_of("whole", chat_longer)
    assert whole["pairs"] > 20 and whole["judge"]["questions"] == whole["judge"]["requests"] == asked
    assert set(whole["judge"]) == set(FIGURES) - {"cost"}
    stop = asked // 2 + 3  # in the middle of a chunk
    with pytest.raises(RunAgain, match="answers are kept"):
        figures_of("parts", lambda number, body: chat_longer(number, body) if number < stop else (500, {}, ""), tries=1)
    rest, more = figures_of("parts", chat_longer)
    assert more == asked - stop
    ours = {name for name, value in rest["judge"].items() if value != whole["judge"][name]}
    assert ours == {"requests", "cache_hits"}
    assert rest["judge"]["requests"] + rest["judge"]["cache_hits"] == asked
    assert {**rest, "judge": 0} == {**whole, "judge": 0}
    assert {f"judge.{name}" for name in whole["judge"]} <= set(Label.meanings)


def test_the_public_names_are_there():
    assert aj.HTTPJudge("u", "m", PLAIN) == dataclasses.replace(JUDGE, url="u")
    assert aj.Question is Question and aj.choice_question is choice_question
