"""Tokenizers of many kinds: what stands around a prompt, continuations, chat templates and stop sequences."""

import dataclasses

import numpy as np
import pytest
import tokenizers
import transformers

from alignjax.checkpoints import huggingface
from alignjax.errors import UserError
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import (
    blank_tokens,
    decode_continuation,
    decode_reply,
    encode_continuation,
    pad,
    stop_sequences,
    with_chat_template,
)
from alignjax.pipeline.stages.writing import stop_tokens, unseen_stops
from alignjax.tasks import sandbox
from alignjax.tasks.dialogue_format import dialogue_messages
from alignjax.tasks.task import EOS, Format
from alignjax.types import Completion

TEXTS = [
    "Human: may I sing?\n\nAssistant: Sing on, my dear.\n\nHuman: Thank you.",
    "Human: no\n\nAssistant: Well.",
] * 20
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
    assert eos not in ids and tokenizer.end_tokens == (eos,)


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


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_without_text_are_those_whose_pieces_are_white_space(tmp_path, kind):
    tokenizer = opened(KINDS[kind](), tmp_path)
    pieces = transformers.AutoTokenizer.from_pretrained(tmp_path).convert_ids_to_tokens(range(tokenizer.vocab_size))
    spaces = {"▁", *(f"<0x{ord(space):02X}>" for space in "\t\n\x0b\x0c\r \x1c\x1d\x1e\x1f")}
    assert {pieces[token] for token in blank_tokens(tokenizer, tokenizer.vocab_size)} == spaces
    beyond = tuple(range(tokenizer.vocab_size, tokenizer.vocab_size + 2))  # a model may have such tokens
    assert blank_tokens(tokenizer, tokenizer.vocab_size + 2)[-2:] == beyond


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
    task = dataclasses.replace(sandbox.sandbox_task(), format=Format(" ", MARKER, (EOS, MARKER)))
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
        complete = [any(tuple(ids[i - len(stop) : i]) == stop for stop in stops) for i in range(len(ids))]
        assert not any(complete[: len(ids) - 1])  # and not before its end
    for piece in ("", "\n"):
        with pytest.raises(UserError, match="stop"):
            stop_sequences(
                huggingface.train_tokenizer(["x"] * 9, 280, ())._replace(encode_bare=lambda t: [3] * t.count("a")),
                piece,
            )
