"""Text between models: tokenizers of many kinds, chat templates, stop sequences, and a preference model that reads
another tokenizer's tokens."""

import dataclasses
import types

import jax
import numpy as np
import pytest
import tokenizers
import transformers

from alignjax.checkpoints import huggingface
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import (
    with_chat_template,
    decode_continuation,
    decode_reply,
    encode_continuation,
    pad,
    stop_sequences,
)
from alignjax.pipeline.stages import Trainable, stop_tokens, unseen_stops
from alignjax.pipeline.stages.train_policy import shares_tokens, translator
from alignjax.preferences import models as preference
from alignjax.sampling import samplers as rollout
from alignjax.sampling.process import Process, Sample, ends, sample
from alignjax.tasks import sandbox
from alignjax.tasks.task import EOS, Format, dialogue_messages
from alignjax.types import Completion, TrainState
from tests.test_huggingface import TEXTS

MARKER = "\n\nHuman:"
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def metaspace(special, **more):
    """A sentencepiece-like tokenizer folder's: "▁" in front of words, bytes for what it does not know; ``special``
    is its post-processor's template."""
    texts = [text.replace("\n", " ") for text in TEXTS]
    names = ["<pad>", "</s>", "<unk>", "<s>"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    inner.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=[*names, *bytes_], show_progress=False)
    inner.train_from_iterator(texts, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=special, special_tokens=[(name, inner.token_to_id(name)) for name in ("</s>", "<s>")]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **more)


def opened(fast, folder):
    """Through its folder, as a user's comes."""
    fast.save_pretrained(folder)
    return huggingface.read_tokenizer(folder)


KINDS = {
    # as Llama's: BOS in front, no pad token
    "llama": lambda: metaspace("<s> $A", bos_token="<s>", eos_token="</s>", unk_token="<unk>"),
    # as T5's: the end token behind every text
    "t5": lambda: metaspace("$A </s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"),
    # pad is the end token
    "pad_is_eos": lambda: metaspace(
        "<s> $A </s>", bos_token="<s>", eos_token="</s>", pad_token="</s>", unk_token="<unk>"
    ),
    "left": lambda: metaspace("$A", eos_token="</s>", pad_token="<pad>", unk_token="<unk>", padding_side="left"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_has_what_stands_before_and_never_what_stands_behind(tmp_path, kind):
    tokenizer = opened(KINDS[kind](), tmp_path)
    bos, eos = (
        huggingface.transformers.AutoTokenizer.from_pretrained(tmp_path).convert_tokens_to_ids(t)
        for t in ("<s>", "</s>")
    )
    ids = tokenizer.encode("Sing on, my dear.")
    assert ids == ([bos] if kind in ("llama", "pad_is_eos") else []) + tokenizer.encode_bare("Sing on, my dear.")
    assert eos not in ids and tokenizer.ends == (eos,)


@pytest.mark.parametrize("kind", KINDS)
def test_continuations_and_bytes_survive(tmp_path, kind):
    """What no piece spells goes through bytes; a reply's first space is kept."""
    tokenizer = opened(KINDS[kind](), tmp_path)
    for reply in (" Sing on, my dear.", " Well.", " naïve 数 ☃"):
        ids = encode_continuation(tokenizer, reply)
        assert decode_continuation(tokenizer, ids) == reply
    prompt = "Human: may I sing?"
    assert tokenizer.encode(prompt) + encode_continuation(tokenizer, " Sing on") == tokenizer.encode(
        prompt + " Sing on"
    )


def test_the_end_token_is_scored_and_kept_where_pad_is_the_same(tmp_path, model, params):
    """Padding is told by the mask alone: the same id inside a reply is a real token."""
    eos = 2
    ids = [[5, eos], [6, 7, 8]]
    padded = pad(ids, 3)
    filled = Completion(np.where(padded.mask, padded.tokens, eos), padded.mask)
    prompt = pad([[3, 4], [9, 9]], 2)
    got, want = (log_prob(model)(params, prompt, completion) for completion in (filled, padded))
    np.testing.assert_array_equal(got, want)
    assert got[0, 1] < 0 and got[0, 2] == 0


def test_a_chat_model_is_asked_through_its_own_template(tmp_path):
    fast = KINDS["llama"]()
    fast.chat_template = CHAT
    plain = opened(fast, tmp_path / "chat")
    tokenizer = with_chat_template(plain, dialogue_messages)
    prompt = "Human: may I?\n\nAssistant: No.\n\nHuman: sing\n\nAssistant:"
    text = "<s>[user]may I?[assistant]No.[user]sing[assistant]"
    assert tokenizer.encode(prompt) == plain.encode_bare(text)  # one BOS, the template's
    affixed = prompt.removesuffix(":") + " (harmless, helpful response):"
    assert tokenizer.encode(affixed) == plain.encode_bare(text.replace("sing", "sing (harmless, helpful response)"))
    with pytest.raises(UserError, match="no chat template"):
        with_chat_template(opened(KINDS["t5"](), tmp_path / "t5"), dialogue_messages)
    with pytest.raises(UserError, match="no dialogue"):
        dialogue_messages("Once upon a time")
    first = dialogue_messages(f"You are a pirate.\n\n{prompt}")[0]
    assert first == {"role": "system", "content": "You are a pirate."}
    fast.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match="roles must alternate"):
        with_chat_template(opened(fast, tmp_path / "strict"), dialogue_messages).encode(prompt)


def test_every_end_token_of_a_generation_config_stops(tmp_path):
    KINDS["llama"]().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    task = dataclasses.replace(sandbox.task(sandbox.World()), format=Format(" ", MARKER, (EOS, MARKER)))
    tokenizer = huggingface.read_tokenizer(tmp_path)
    stop = stop_tokens(task, tokenizer)
    assert stop[:2] == ((1,), (7,)) and tuple(encode_continuation(tokenizer, MARKER)) in stop and len(stop[2]) > 1
    assert unseen_stops(task, tokenizer) == (1, 7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(UserError, match="eos_token_id"):
        huggingface.read_tokenizer(tmp_path)


def test_a_reply_that_an_end_token_ends_has_the_task_s_end_marker(tmp_path):
    tokenizer = opened(KINDS["llama"](), tmp_path)
    ids = encode_continuation(tokenizer, " Well.")
    assert decode_reply(tokenizer, [*ids, 1], ((1,),), MARKER) == f" Well.{MARKER}"
    assert decode_reply(tokenizer, ids, ((1,),), MARKER) == " Well."
    assert decode_reply(tokenizer, [*ids, 1], ((9,),), MARKER).startswith(" Well.")
    assert decode_reply(tokenizer, [], ((1,),), MARKER) == ""


def test_a_stop_is_met_however_its_beginning_is_written():
    """As Llama 3's and Qwen's tokenizers do, this one writes punctuation and the newlines behind it as one token."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.Regex(r"[A-Za-z]+| ?[^\sA-Za-z]+[\n]*|\s+")
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(split, "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(TEXTS, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer = huggingface.wrap_tokenizer(fast, ())
    stops = stop_sequences(tokenizer, MARKER)
    assert len({stop[0] for stop in stops}) > 1
    for reply in ("Sing on, my dear.", "Well", "so!", "really?", "he (she)"):
        ids = encode_continuation(tokenizer, f" {reply}{MARKER}")
        assert any(tuple(ids[-len(stop) :]) == stop for stop in stops), reply
        whole = [any(tuple(ids[i - len(stop) : i]) == stop for stop in stops) for i in range(len(ids))]
        assert not any(whole[: len(ids) - 1])  # and not before its end
    for nothing in ("", "\n"):
        with pytest.raises(UserError, match="stop"):
            stop_sequences(
                huggingface.train_tokenizer(["x"] * 9, 280, ())._replace(encode_bare=lambda t: [3] * t.count("a")),
                nothing,
            )


def test_a_stop_sequence_of_several_tokens_ends_a_row_where_it_is_whole():
    """A process that writes a fixed text: the reply ends behind 5 6 7, and not at 5 6 8 or at a half at the end."""
    script = np.array([[5, 6, 8, 5, 6, 7, 9, 9], [1, 5, 5, 6, 7, 1, 1, 1], [9, 9, 9, 9, 9, 9, 5, 6]])
    logits = 50.0 * np.eye(12, dtype=np.float32)[script]  # [B, T, V]

    def step(index, token):
        return index + 1, jax.lax.dynamic_index_in_dim(logits, index + 1, 1, keepdims=False)

    keys = jax.random.split(jax.random.key(0), 3)
    drawn = jax.jit(lambda: sample(Process(step, 0, logits[:, 0]), keys, 8, ((5, 6, 7), (4,))))()
    assert drawn.completion.mask.sum(1).tolist() == [6, 5, 8] and drawn.finished.tolist() == [True, True, False]
    assert drawn.completion.tokens[0, :6].tolist() == [5, 6, 8, 5, 6, 7]
    assert not ends(np.array([[7, 5, 6]]), np.int32(0), ((5, 6, 7),)).any()  # nothing before the beginning


REPLIES = (" Sing on, my dear.", " Well.", "", " Sing")
PROMPTS = ["Human: may I sing?\n\nAssistant:", "Human: no\n\nAssistant:"]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A policy's tokenizer and another's, of another kind."""
    mine = huggingface.train_tokenizer(TEXTS, 320, ("Human:",))
    return mine, opened(KINDS["llama"](), tmp_path_factory.mktemp("theirs"))


def drawn_of(tokenizer, texts):
    """Replies as a policy drew them, each with its end."""
    ids = [encode_continuation(tokenizer, text) for text in texts]
    completion = pad(ids, 16)
    return Sample(completion, np.zeros((len(ids), 16), np.float32), np.array([MARKER in text for text in texts]))


def test_the_preference_model_reads_the_replies_as_text_in_its_own_tokens(readers):
    mine, theirs = readers
    task = sandbox.task(sandbox.World())
    y = drawn_of(mine, [f" Sing on, my dear.{MARKER}", f" Well.{MARKER}"])
    other = drawn_of(mine, [f"{MARKER}", " never ends"])
    prompt = pad([mine.encode(text) for text in PROMPTS], 16)
    context = types.SimpleNamespace(task=task, mesh=sharding.make_mesh(sharding.Mesh(1, 1, 1), jax.devices()[:1]))
    trained = Trainable({}, {}, lambda params, frozen: params, None, ())
    state = TrainState(np.int32(3), {"w": np.zeros(1)}, {}, {}, jax.random.key(0))
    stop = stop_tokens(task, mine)
    before = translator(context, lambda *_: rollout.Drawn(prompt, y, other), trained, mine, theirs, PROMPTS, stop, 12)
    drawn, seen = before(state, None, prompt)
    for i, text in enumerate(PROMPTS):
        assert seen.prompt.tokens[i][seen.prompt.mask[i]].tolist() == theirs.encode(text)
    for i, reply in enumerate(("Sing on, my dear.", "Well.")):
        ids = encode_continuation(theirs, f" {reply}{MARKER}")[:12]
        assert seen.y.tokens[i][seen.y.mask[i]].tolist() == ids
    assert [side.tolist() for side in seen.answered] == [[True, True], [False, False]]
    np.testing.assert_array_equal(drawn.y.completion.tokens, y.completion.tokens)


def test_a_refused_reply_loses_to_an_answer_and_ties_with_another(readers):
    mine, _ = readers
    sides = [drawn_of(mine, [" a", " b", " c"]) for _ in range(2)]
    prompt = pad([[3], [4], [5]], 1)
    seen = rollout.Seen(
        prompt,
        sides[0].completion,
        sides[1].completion,
        (np.array([True, False, False]), np.array([False, True, False])),
    )

    def logit(params, prompt, first, second):
        return jax.numpy.full(3, 2.0)

    def found(seen):
        score = lambda *_: np.zeros((3, 16), np.float32)  # noqa: E731
        frozen = {"reference": {}, "preference": {}}
        return rollout.compared(score, logit, False, frozen, rollout.Drawn(prompt, *sides), seen).p.tolist()

    assert found(seen) == [1.0, 0.0, 0.5]
    asked = dataclasses.replace(seen, answered=None)
    assert found(asked) == [float(preference.probability(np.float32(2.0)))] * 3


def test_tokens_are_shared_only_between_equal_tokenizers_and_end_markers(readers):
    task = sandbox.task(sandbox.World())
    one, same, other = (types.SimpleNamespace(fingerprint=mark) for mark in ("a", "a", "b"))
    assert shares_tokens(task, one, same) and not shares_tokens(task, one, other)
    chatty = dataclasses.replace(task, format=task.format._replace(stop=(EOS, MARKER)))
    assert not shares_tokens(chatty, one, same)
    plain = dataclasses.replace(chatty, format=chatty.format._replace(end=""))
    assert shares_tokens(plain, one, same)
