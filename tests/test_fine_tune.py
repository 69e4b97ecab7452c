"""Supervised fine-tuning: the loss of the preferred replies alone, whatever they are packed with; replies of a file."""

import dataclasses
import functools
import json
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.fields import Kind
from alignjax.models.build import build
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import decode_reply, encode_continuation, pad
from alignjax.objectives import next_token_loss, packed_next_token_loss
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, order
from alignjax.pipeline.export_pairs import PairForm, export_pairs
from alignjax.pipeline.networks import Network, NetworkRecord
from alignjax.pipeline.run import run
from alignjax.pipeline.stages import fine_tune
from alignjax.pipeline.stages.fine_tune import encode_ended, encode_examples, packed_examples, separate_examples
from alignjax.pipeline.stages.writing import stop_tokens
from alignjax.tasks import dialogue, summary
from alignjax.tasks.json_lines import Demonstration, read_demonstration
from alignjax.tasks.task import EOS, Format
from alignjax.training import data, loop
from alignjax.training.metrics import read_metrics
from tests.test_rated import given, pairs_of
from tests.test_raters import T5
from tests.test_summary import write_rows
from tests.test_wiring import MODEL, WORDS, mesh, task, tokenizer

PROMPT, REPLY = 16, 8  # tokens that the referee pads to
MODELS = {"decoder": MODEL, "t5": T5}


def examples(count, seed=0):
    """Returns random prompts of 1 to 12 tokens and replies of 1 to 8."""
    rng = np.random.default_rng(seed)
    sizes = zip(rng.integers(1, 13, count), rng.integers(1, 9, count), strict=True)
    return [tuple(rng.integers(5, 290, size).tolist() for size in pair) for pair in sizes]


@functools.cache
def params_of(name):
    return jax.tree.map(lambda x: 3 * x, build(MODELS[name]).init(jax.random.key(0)))


@functools.cache
def referee(name):
    """Returns the jitted (params, examples) -> mean negative log-likelihood of the replies, each example a row."""
    score = log_prob(build(MODELS[name]))

    def loss(params, prompts, replies):
        return -jnp.sum(score(params, prompts, replies)) / jnp.sum(replies.mask)

    jitted = jax.jit(jax.value_and_grad(loss))
    return lambda params, found: jitted(params, pad([x for x, _ in found], PROMPT), pad([y for _, y in found], REPLY))


def same_slope(found, want):
    np.testing.assert_allclose(np.asarray(found), np.asarray(want), rtol=1e-3, atol=2e-5)


def whole_batch(corpus, found, row):
    """Returns all rows of a corpus as one batch, and the corpus."""
    count = corpus(found, row, 1, 0).figures["rows"]
    made = corpus(found, row, count, 0)
    return made.make_batch(data.BatchPlan(np.arange(count), row)), made


@pytest.mark.parametrize("row", [20, 64])
def test_the_packed_loss_and_its_gradient_are_those_of_the_replies_alone(row):
    """Neighbours in a row, prompts and padding add nothing: neither to the mean nor to the gradient."""
    found, model = examples(14), build(MODEL)
    batch, _ = whole_batch(packed_examples, found, row)
    loss = functools.partial(packed_next_token_loss, forward=model.forward, logits=model.logits)
    (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params_of("decoder"), batch, None)
    want, slope = referee("decoder")(params_of("decoder"), found)
    assert value == pytest.approx(float(want), rel=1e-5) and metrics["nll"] == value
    jax.tree.map(same_slope, gradient, slope)
    assert int(batch.learned.sum()) == sum(len(reply) for _, reply in found)


def test_every_example_is_packed_once_with_its_prompt_before_it():
    found = examples(14)
    batch, corpus = whole_batch(packed_examples, [*found, ([7] * 40, [8])], 24)
    packed = []
    for tokens, segments, learned in zip(batch.tokens, batch.segments, batch.learned, strict=True):
        for number in range(1, segments.max() + 1):
            own = segments == number
            packed.append((tokens[own & ~learned].tolist(), tokens[own & learned].tolist()))
            assert np.all(np.diff(learned[own].astype(int)) >= 0)  # first the prompt, then the reply
    assert packed == found
    assert corpus.figures == {"examples": 14, "too_long": 1, "rows": len(batch.tokens)}


def test_an_encoder_decoder_learns_the_replies_each_from_its_own_prompt():
    found = [*examples(13), ([7] * PROMPT, [8] * 3)]
    batch, corpus = whole_batch(separate_examples, [*found, ([7] * 17, [8]), ([7], [8] * 17)], 16)
    loss = functools.partial(next_token_loss, log_prob=log_prob(build(T5)))
    (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params_of("t5"), batch, None)
    want, slope = referee("t5")(params_of("t5"), found)
    assert value == pytest.approx(float(want), rel=1e-5)
    jax.tree.map(same_slope, gradient, slope)
    assert corpus.figures == {"examples": 14, "too_long": 2, "rows": 14}


@pytest.mark.parametrize("corpus", [packed_examples, separate_examples])
def test_examples_that_are_all_too_long_are_told(corpus):
    with pytest.raises(UserError, match=r"^none of 3 examples fits a row of 4 tokens; raise row$"):
        corpus([([7] * 9, [8] * 9)] * 3, 4, 1, 0)


def test_the_preferred_reply_is_learned_and_ties_are_not():
    rows = [("red", "one", "two", 1.0), ("blue", "one", "two", 0.0), ("green", "three", "four", 0.49),
            ("red", "five", "six", 0.5), ("blue", "five", "six", 0.51)]  # fmt: skip
    rows = [dict(zip(("prompt", "first", "second", "p"), row, strict=True)) for row in rows]
    used = task(format=Format(" ", " END", ("END",)))
    wanted = [("red", "one"), ("blue", "two"), ("green", "four"), ("blue", "five")]
    assert encode_examples(rows, tokenizer(), used) == [
        (tokenizer().encode(prompt), encode_continuation(tokenizer(), f" {reply} END")) for prompt, reply in wanted
    ]


@pytest.mark.parametrize("reply_format", [
    Format(" ", "", (EOS,)), Format("", "", (EOS, "<s>")), Format(" ", "\n\nHuman:", ("Human:",)),
    Format(" ", "\n\nHuman:", ("Human:", EOS)), Format(" ", " END", (EOS,)),
], ids=str)  # fmt: skip
def test_what_is_learned_ends_as_the_writer_must_end_and_reads_as_the_reply(reply_format):
    """Taken for a drawn completion it stops at its end, and decodes to the reply with the format's end marker."""
    used = task(format=reply_format)
    ids = encode_ended(tokenizer(), used, "red blue")
    stops = stop_tokens(used, tokenizer())
    ends = [n for n in range(1, len(ids) + 1) if any(tuple(ids[:n][-len(stop) :]) == stop for stop in stops)]
    assert ends == [len(ids)]
    assert decode_reply(tokenizer(), ids, stops, reply_format.end) == f"{reply_format.before}red blue{reply_format.end}"


def test_of_several_end_tokens_the_tokenizer_s_eos_is_learned():
    chat = tokenizer()._replace(end_tokens=(7, 9, 11), specials={"eos_token_id": 11})
    for specials, end in (({"eos_token_id": 11}, 11), ({}, 7), ({"eos_token_id": 5}, 7)):
        assert encode_ended(chat._replace(specials=specials), task(), "red")[-1] == end
    assert encode_ended(chat._replace(end_tokens=()), task(format=Format(" ", "", (EOS, "red"))), "red")[-1] not in (
        7, 11,
    )  # fmt: skip


# the stage


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A stage whose network is drawn from a key; its replies end with token 0."""

    name: str
    ends: bool = True  # whether its tokenizer has an end token
    makes: ClassVar[Kind] = Kind.POLICY
    meanings: ClassVar[dict] = {}

    def check(self, context):
        pass

    def network(self, context):
        words = tokenizer() if self.ends else tokenizer()._replace(end_tokens=())
        return NetworkSpec(NetworkRecord(MODELS[self.name], "float32", {}, False, None), words, "words")

    def exposure(self, context):
        return Exposure()

    def programs(self, context):
        return ()

    def run(self, context, programs):
        model = build(MODELS[self.name])
        networks.save(context.folder, Network(context.name, model, tokenizer(), "words", params_of(self.name)))
        return {}


PAIRS = given(24)
TIES = dataclasses.replace(PAIRS, rows=tuple((*row[:3], 0.5, *row[4:]) for row in PAIRS.rows))


def tune(**changes):
    fields: dict[str, Any] = dict(
        start="base", pairs="pairs", adam=aj.Adam(1e-2, warmup=0, schedule="constant"),
        loop=aj.Loop(steps=6, batch=8, log_every=1, save_every=2), row=24,
    )  # fmt: skip
    return aj.FineTune(**{**fields, **changes})


def experiment(**stages):
    whole = {"base": Drawn("decoder"), "t5": Drawn("t5"), "pairs": PAIRS, **stages}
    return aj.Experiment(task(), whole, mesh=aj.Mesh(data=-1))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Policies of all kinds of start, fine-tuned on the same pairs."""
    tokenizer()  # it is made before it is described
    whole = experiment(
        full=tune(), adapted=tune(lora=aj.Lora(2, 32.0, ("q", "v", "up"))),
        encoded=tune(start="t5", loop=aj.Loop(steps=6, batch=24, log_every=1)),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tuned")
    run(whole, folder)
    return whole, folder


def learned_nll(folder, name, kind="decoder"):
    """The referee's loss of every pair's preferred reply under a finished stage's policy."""
    found = encode_examples(pairs_of(folder, "pairs"), tokenizer(), task())
    network = Context(experiment(), folder, "base", mesh()).load(name)
    return float(referee(kind)(network.params, found)[0])


@pytest.mark.parametrize(("name", "start"), [("full", "base"), ("adapted", "base"), ("encoded", "t5")])
def test_a_policy_learns_the_preferred_replies_from_where_its_start_stands(tuned, name, start):
    """One step of ``encoded`` is all pairs, so its first loss is the start's own over them."""
    kind = "t5" if name == "encoded" else "decoder"
    rows = read_metrics(tuned[1] / name / "metrics.jsonl")
    before, after = learned_nll(tuned[1], start, kind), learned_nll(tuned[1], name, kind)
    assert len(rows) == 6 and after < before - 0.05
    if name == "encoded":
        assert rows[0]["nll"] == pytest.approx(before, rel=1e-4)
    figures = storage.read_json(tuned[1] / name / "stage.json")["figures"]
    assert (figures["examples"], figures["ties"], figures["too_long"]) == (24, 0, 0)
    assert {*figures, *rows[0]} <= {*aj.FineTune.meanings, "step", "gradient_norm", "learning_rate"} | set(rows[0])


def test_the_first_loss_is_the_start_s_own_over_the_examples_of_its_rows(tuned):
    """Of the rows that the plan of step 0 names, with and without adapters."""
    rows = data.read_pairs(tuned[1] / "pairs" / "data", "train")
    context = Context(tuned[0], tuned[1], "full", mesh())
    corpus = packed_examples(encode_examples(rows, tokenizer(), task()), 24, 8, context.seed(0))
    batch = corpus.make_batch(corpus.plan(0))
    model = build(MODEL)
    loss = packed_next_token_loss(params_of("decoder"), batch, None, forward=model.forward, logits=model.logits)[0]
    for name in ("full", "adapted"):
        assert read_metrics(tuned[1] / name / "metrics.jsonl")[0]["nll"] == pytest.approx(float(loss), rel=1e-4)


def test_adapters_are_trained_over_the_start_and_are_all_that_is_written(tuned):
    record = storage.read_json(tuned[1] / "adapted" / "model.json")
    assert record["shared_base"]["stage"] == "base"
    network = Context(tuned[0], tuned[1], "full", mesh()).load("adapted")
    jax.tree.map(np.testing.assert_array_equal, network.base, params_of("decoder"))
    assert learned_nll(tuned[1], "full") < learned_nll(tuned[1], "adapted")


def test_a_stopped_fine_tuning_ends_with_the_same_bits(tuned, tmp_path, monkeypatch):
    """Stopped after step 3, it goes on from the save of step 2."""
    whole, after, steps = experiment(full=tune()), loop._Hooks.after, []

    def stopped(hooks, step, *rest):
        steps.append(step)
        if len(steps) == 3:
            raise UserError("stopped")
        after(hooks, step, *rest)

    monkeypatch.setattr(loop._Hooks, "after", stopped)
    for name in ("base", "t5", "pairs"):
        run(whole, tmp_path, only=[name])
    with pytest.raises(UserError, match="stopped"):
        run(whole, tmp_path, only=["full"])
    run(whole, tmp_path, only=["full"])
    assert steps == [1, 2, 3, 3, 4, 5, 6]
    found, want = (Context(whole, folder, "full", mesh()).load("full") for folder in (tmp_path, tuned[1]))
    jax.tree.map(np.testing.assert_array_equal, found.base, want.base)
    assert read_metrics(tmp_path / "full" / "metrics.jsonl") == read_metrics(tuned[1] / "full" / "metrics.jsonl")


def test_what_cannot_be_imitated_is_refused(tmp_path):
    def check(stage, **stages):
        stage.check(Context(experiment(wrong=stage, **stages), None, "wrong", mesh()))

    check(tune())
    with pytest.raises(UserError, match=r"wrong\.loop\.batch"):
        check(tune(loop=aj.Loop(steps=1, batch=9)))
    with pytest.raises(UserError, match=r"FineTune\.row=1 must be in \[2"):
        tune(row=1)
    with pytest.raises(UserError, match=r"^task 'words' stops at the tokenizer's end token, and it has none"):
        check(tune(), base=Drawn("decoder", ends=False))
    with pytest.raises(
        UserError, match=r"^wrong: all 24 pairs of 'pairs' have p = 1/2, and so no preferred reply; name"
    ):
        run(experiment(pairs=TIES, wrong=tune()), tmp_path)


# replies of a file


def said(role, content):
    return {"role": role, "content": content}


GOOD = {"prompt": "A cat", "completion": " sat."}
CHAT = [said("user", "A cat")]


@pytest.mark.parametrize("row", [
    GOOD, {"prompt": CHAT, "completion": [said("assistant", " sat.")]}, {"prompt": CHAT, "completion": " sat."},
    {"prompt": CHAT, "completion": [*CHAT, said("assistant", " sat.")]}, {**GOOD, "id": 3},
])  # fmt: skip
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_replies_are_pairs_that_the_file_s_reply_wins_alone(tmp_path, row, suffix):
    assert read_demonstration(row) == Demonstration("A cat", " sat.")
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text(json.dumps(row) + "\n" + json.dumps(row))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row, row]), path)
    run(experiment(replies=aj.LoadReplies(str(path))), tmp_path / "w", only=["replies"])
    want = {"prompt": "A cat", "first": " sat.", "second": "", "p": 1.0, "affix": -1, "positive": -1}
    assert pairs_of(tmp_path / "w", "replies") == [want, want]
    figures = storage.read_json(tmp_path / "w" / "replies" / "stage.json")["figures"]
    assert figures == {"replies": 2, "different_prompts": 1} and set(figures) < set(aj.LoadReplies.meanings)


@pytest.mark.parametrize(("row", "words"), [
    ({"prompt": "x"}, "line 2 has no 'completion'"), ({"completion": "x"}, "line 2 has no 'prompt'"),
    ({**GOOD, "completion": " "}, "line 2 has 'completion' without a text"),
    ({**GOOD, "prompt": [*CHAT, *CHAT]}, "line 2 has a 'prompt' of other messages than one of the user; give"),
    ({**GOOD, "completion": CHAT}, "line 2 has 'completion' that is no message of the assistant"),
])  # fmt: skip
def test_a_reply_of_another_form_is_named_by_its_line_before_anything_runs(tmp_path, row, words):
    path = write_rows(tmp_path / "a.jsonl", [GOOD, row])
    stage = aj.LoadReplies(path)
    context = Context(experiment(replies=stage), None, "replies", mesh())
    with pytest.raises(UserError) as error:
        stage.check(context)
    assert f"replies: {path}, {words}" in str(error.value) and "\n" not in str(error.value)
    skipping = dataclasses.replace(stage, skip_malformed=True)
    (tmp_path / "w" / "replies").mkdir(parents=True)
    with pytest.warns(UserWarning, match="1 of 2 lines are malformed"):
        figures = skipping.run(dataclasses.replace(context, workdir=tmp_path / "w"), ())
    assert figures == {"replies": 1, "different_prompts": 1, "malformed": 1}
    assert set(figures) == set(aj.LoadReplies.meanings)


def test_dialogues_of_several_turns_are_read_from_chats():
    chat = [said("system", "s"), said("user", "a"), said("assistant", "b"), said("user", "c")]
    found = dialogue.read_chat_demonstration({"prompt": chat, "completion": [*chat, said("assistant", "d")]})
    compared = dialogue.read_chat_comparison({"prompt": chat, "chosen": "d", "rejected": "e"})
    assert found == Demonstration(compared.prompt, "d")
    with pytest.raises(ValueError, match="that is no dialogue of a user and an assistant"):
        dialogue.read_chat_demonstration({"prompt": [said("assistant", "a")], "completion": "d"})


def test_a_post_s_summary_is_the_reply_to_the_prompt_of_its_task(tmp_path):
    posts = [{"post": "I ran.", "summary": " Ran.\n"}, {"title": "Help", "post": " I fell.", "summary": "Fell."}]
    path = write_rows(tmp_path / "a.jsonl", posts)
    for query in (summary.T5_QUERY, summary.PLAIN_QUERY):
        read = functools.partial(summary.read_tldr_demonstration, query=query)
        asked = summary.summary_task(path, query=query).source.prompts("train", 9, 0)
        found = dict(map(read, posts))
        assert found.keys() == set(asked) and set(found.values()) == {"Ran.", "Fell."}
    assert dict(map(summary.read_tldr_demonstration, posts))["summarize: I ran."] == "Ran."
    with pytest.raises(KeyError, match="summary"):
        summary.read_tldr_demonstration({"post": "x"})


def test_a_policy_is_fine_tuned_on_replies_and_nothing_else_takes_them_for_pairs(tmp_path):
    rows = [{"prompt": f"red {word}", "completion": "yes"} for word in WORDS]
    path = write_rows(tmp_path / "a.jsonl", rows)
    whole = experiment(replies=aj.LoadReplies(path), tuned=tune(pairs="replies", row=8))
    for name in ("base", "replies", "tuned"):
        run(whole, tmp_path / "w", only=[name])
    metrics = read_metrics(tmp_path / "w" / "tuned" / "metrics.jsonl")
    assert metrics[-1]["nll"] < metrics[0]["nll"] - 0.5
    fit = aj.FitPreference(
        start="base", pairs="replies", adam=aj.Adam(1e-3), loop=aj.Loop(1, 8), buckets=(8,), response=8
    )
    with pytest.raises(UserError, match=r"^stage 'fit' needs pairs as pairs, and 'replies' makes replies; name"):
        order(whole.with_stages(fit=fit).stages)
    with pytest.raises(UserError, match="replies holds replies that stand alone, as its file does; name a stage of"):
        export_pairs(tmp_path / "w" / "replies", tmp_path / "out.jsonl", "train", PairForm(False, False))


def first_words(source, prompt, fits):
    """Returns as many of a prompt's words as fit."""
    words = prompt.split()
    return next((text for n in range(len(words), 0, -1) if fits(text := " ".join(words[:n]))), None)


def test_a_long_prompt_is_shortened_to_what_later_stages_ask_and_a_long_reply_is_left_out(tmp_path, monkeypatch):
    """Beside its reply in a packed row; the limit is the stage's own and not the row's."""
    asked, encode = [], fine_tune.encode_examples
    monkeypatch.setattr(fine_tune, "encode_examples", lambda rows, *more: asked.extend(rows) or encode(rows, *more))
    rows = [{"prompt": f"red {word}", "completion": "yes"} for word in WORDS]
    rows += [{"prompt": "red" + " blue" * 30, "completion": "no"}, {"prompt": "red", "completion": "yes" + " no" * 9}]
    replies = aj.LoadReplies(write_rows(tmp_path / "a.jsonl", rows))
    tuned = tune(pairs="replies", row=9, shorten_to=4, loop=aj.Loop(steps=1, batch=8))
    whole = dataclasses.replace(experiment(replies=replies, tuned=tuned), task=task(shorten=first_words))
    for name in ("base", "replies", "tuned"):
        run(whole, tmp_path / "w", only=[name])
    figures = storage.read_json(tmp_path / "w" / "tuned" / "stage.json")["figures"]
    assert (figures["examples"], figures["too_long"], figures["shortened"]) == (len(rows) - 1, 1, 1)
    lengths = [len(tokenizer().encode(row["prompt"])) for row in asked if row["first"] == "no"]
    assert lengths == [4]
    for wrong in (0, 10):
        with pytest.raises(UserError, match=r"FineTune\.shorten_to="):
            tune(row=9, shorten_to=wrong)


def test_another_content_of_the_file_is_another_stage(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [GOOD])
    first = aj.LoadReplies(path)
    write_rows(tmp_path / "a.jsonl", [{**GOOD, "completion": "x"}])
    context = Context(experiment(one=first, two=aj.LoadReplies(path)), None, "one", mesh())
    assert context.exposure("one").fitted.isdisjoint(context.exposure("two").fitted)
    pairs = aj.LoadPairs(path)
    assert Context(experiment(pairs=pairs), None, "pairs", mesh()).exposure("pairs") == context.exposure("two")
    assert fine_tune.FineTune.makes == Kind.POLICY
