"""Damaged tokenizer_config.json in the folder of every family, against the tokenizer that transformers makes of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from alignjax.models.tokenizer import with_chat_template
from alignjax.tasks.task import one_message
from tests.fuzz.folders import TEXTS, TOKENIZER, checked, documents, make_folders
from tests.fuzz.json_mutations import Path as JsonPath
from tests.fuzz.json_mutations import mutations
from tests.fuzz.outcomes import Disagreement, Input

_KNOWN: dict[JsonPath, list[str]] = {
    ("tokenizer_class",): ["LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer", "GemmaTokenizer",
                           "T5Tokenizer", "GPTNeoXTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend"],
    ("padding_side",): ["right"],
    ("eos_token",): ["<pad>", "<unk>", "a"],
    ("bos_token",): ["<pad>", "a"],
    ("chat_template",): ["{{ messages[0]['content'] }}", "{{ nothing }}", "{% if %}", "hello", "{{ 1/0 }}"],
}  # fmt: skip


def inputs(parent: Path, seed: int) -> Iterator[Input]:
    """Yields every damaged tokenizer_config.json; each is written into its folder when it is its turn."""
    folders = make_folders(parent)
    for name, document in documents(TOKENIZER, folders).items():
        for change, text in mutations(document, _KNOWN):
            for chat in (False, True):
                attempt = functools.partial(_attempt, folders[name], text, chat)
                yield Input(f"{name}{' chat' * chat} {change}", (str(folders[name]),), attempt)


def _attempt(folder: Path, text: str, chat: bool) -> None:
    """Reads the folder with another tokenizer_config.json; asks the referee for the same."""
    (folder / TOKENIZER).write_text(text)
    ours = checked(folder, chat).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids, whole = ours.encode_bare(text), ours.encode(text)
        _equal(f"the ids of {text!r}", ids, theirs(text, add_special_tokens=False)["input_ids"])
        _equal(f"the whole ids of {text!r}", whole, _without_end(theirs, text))
        _equal(f"the text of {whole}", ours.decode_all(whole), theirs.decode(whole, clean_up_tokenization_spaces=False))
        if chat and text.strip():
            messages = one_message(text)
            rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            chat_ids = theirs(rendered, add_special_tokens=False)["input_ids"]
            _equal(f"the chat of {text!r}", with_chat_template(ours, one_message).encode(text), chat_ids)


def _without_end(theirs: Any, text: str) -> list[int]:
    """Returns the ids of a text with what stands before it; without what the tokenizer puts behind every text."""
    ids = theirs(text)["input_ids"]
    bare = theirs(text, add_special_tokens=False)["input_ids"]
    first = next(i for i in range(len(ids) + 1) if ids[i : i + len(bare)] == bare)
    return ids[: first + len(bare)] if bare else theirs("a")["input_ids"][: len(ids)]


def _equal(what: str, ours: Any, theirs: Any) -> None:
    """Raises Disagreement where two values differ."""
    if ours != theirs:
        raise Disagreement(f"{what} are {str(ours)[:200]}, the referee's {str(theirs)[:200]}")
