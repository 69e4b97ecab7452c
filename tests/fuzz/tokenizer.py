"""Damaged tokenizer_config.json in the folder of every family, against the tokenizer that transformers makes of it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers

from alignjax.errors import UserError
from alignjax.models.tokenizer import Tokenizer, with_chat_template
from alignjax.tasks.task import one_message
from tests.fuzz.folders import TEXTS, TOKENIZER, checked, documents, make_chat_folder, make_folders
from tests.fuzz.json_mutations import WHOLE, mutations
from tests.fuzz.json_mutations import Path as JsonPath
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
    folders["chat"] = make_chat_folder(parent / "chat")
    for name, document in documents(TOKENIZER, folders).items():
        for change, text in mutations(document, _KNOWN):
            attempt = functools.partial(_attempt, folders[name], text, name == "chat")
            yield Input(f"{name} {change}", (str(folders[name]),), attempt, change == WHOLE)


def _attempt(folder: Path, text: str, chat: bool) -> None:
    """Reads the folder with another tokenizer_config.json; asks the referee for the same."""
    (folder / TOKENIZER).write_text(text)
    ours = checked(folder, chat).tokenizer()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids, whole = ours.encode_bare(text), ours.encode(text)
        _equal(f"the ids of {text!r}", ids, theirs(text, add_special_tokens=False)["input_ids"])
        _equal(f"the whole ids of {text!r}", whole, _before(theirs) + ids)
        _equal(f"the text of {whole}", ours.decode_all(whole), theirs.decode(whole, clean_up_tokenization_spaces=False))
        if chat and text.strip():
            chat_ids = _chat_ids(folder, ours, text)
            rendered = theirs.apply_chat_template(one_message(text), tokenize=False, add_generation_prompt=True)
            _equal(f"the chat of {text!r}", chat_ids, theirs(rendered, add_special_tokens=False)["input_ids"])


def _chat_ids(folder: Path, tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a chat of one message. Raises UserError where the template refuses it.

    Such an error names the template and the message: a tokenizer in use does not know its folder.
    """
    try:
        return with_chat_template(tokenizer, one_message).encode(text)
    except UserError as error:
        if not str(error).startswith("the chat template "):
            raise
        raise UserError(f"{folder}: {error}") from None


def _before(theirs: Any) -> list[int]:
    """Returns the ids that the tokenizer puts before a text."""
    ids, bare = theirs("a")["input_ids"], theirs("a", add_special_tokens=False)["input_ids"]
    return ids[: next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)]


def _equal(what: str, ours: Any, theirs: Any) -> None:
    """Raises Disagreement where two values differ."""
    if ours != theirs:
        raise Disagreement(f"{what} are {str(ours)[:200]}, the referee's {str(theirs)[:200]}")
