"""Text <-> token ids, as a record of functions. Text is the interface between models that differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from alignjax.errors import UserError, one_line
from alignjax.types import Tokens

ANCHORS = ("a", ".", "\n")


Message = dict[str, str]
"""{"role": "user", "content": text}: one turn of a chat."""


class Tokenizer(NamedTuple):
    """``encode`` adds what the tokenizer puts before a text (BOS) and never what it puts behind one (an
    encoder-decoder reads its end token by itself); ``encode_bare`` adds nothing."""

    encode: Callable[[str], list[int]]
    encode_bare: Callable[[str], list[int]]
    decode_all: Callable[[Sequence[int]], str]  # special tokens written out
    token_id: Callable[[str], int | None]  # of a piece that is one token as it stands
    vocab_size: int
    save: Callable[[Path], None]  # a Hugging Face tokenizer folder
    specials: Mapping[str, int] = MappingProxyType({})  # {"bos_token_id": 1, ...}: those that it has
    ends: tuple[int, ...] = ()  # tokens that end what the model writes
    render: Callable[[Sequence[Message]], str] | None = None  # the chat template, the assistant's turn begun


def stand_in(vocab_size: int) -> Tokenizer:
    """For sizes alone, where a model's tokenizer is not at hand: about four bytes a token, all of them token 0."""

    def encode(text: str) -> list[int]:
        return [0] * -(-len(text.encode()) // 4)

    def nowhere(folder: Path) -> None:
        raise UserError("a stand-in for a tokenizer cannot be saved")

    return Tokenizer(encode, encode, lambda ids: "", lambda piece: 0, vocab_size, nowhere, ends=(0,))


def as_chat(tokenizer: Tokenizer, messages: Callable[[str], Sequence[Message]]) -> Tokenizer:
    """The tokenizer of a chat model: ``encode`` puts a prompt's messages in the model's own template.

    Raises UserError when it has none.
    """
    if tokenizer.render is None:
        raise UserError("chat=True, and the tokenizer has no chat template; use a chat model, or chat=False")
    render = tokenizer.render

    def encode(prompt: str) -> list[int]:
        turns = messages(prompt)
        try:
            text = render(turns)
        except Exception as error:  # a template's own words, of any kind
            raise UserError(f"the chat template refuses {[turn['role'] for turn in turns]} ({one_line(error)}); "
                            "prompt it otherwise") from None  # fmt: skip
        return tokenizer.encode_bare(text)

    return tokenizer._replace(encode=encode)


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of text that stands after other text: no BOS, no space put in front by the tokenizer."""
    for anchor in ANCHORS:
        head = tokenizer.encode_bare(anchor)
        ids = tokenizer.encode_bare(anchor + text)
        if ids[: len(head)] == head:
            return ids[len(head) :]
    return tokenizer.encode_bare(text)


def decode_continuation(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Text of ids that stand after other text, its first space kept."""
    head = tokenizer.encode_bare(ANCHORS[0])
    return tokenizer.decode_all([*head, *map(int, ids)]).removeprefix(tokenizer.decode_all(head))


def decode_reply(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[Sequence[int]], end: str) -> str:
    """Text of what a model wrote. Where it ends with one of the ``stop`` sequences that is the tokenizer's own end
    token, the task's ``end`` marker stands for that."""
    ended = len(ids) > 0 and ids[-1] in tokenizer.ends and (ids[-1],) in stop
    return decode_continuation(tokenizer, ids[:-1]) + end if ended else decode_continuation(tokenizer, ids)


def stop_sequences(tokenizer: Tokenizer, piece: str) -> tuple[tuple[int, ...], ...]:
    """The token sequences in which a piece may end a text: it alone where it is a token, else each way in which it is
    written behind a word or a punctuation mark, with which its first token may be one.

    Raises UserError when there are none.
    """
    known = tokenizer.token_id(piece)
    if known is not None:
        return ((known,),)
    found: dict[tuple[int, ...], None] = {}
    head = tokenizer.encode_bare("a")
    for before in ("", ".", "!", "?", ",", ")", '"', "\n"):
        ids = tokenizer.encode_bare(f"a{before}{piece}")
        if ids[: len(head)] == head:
            tails = (tuple(ids[at:]) for at in range(len(ids) - 1, len(head) - 1, -1))
            covering = (tail for tail in tails if decode_continuation(tokenizer, tail).endswith(piece))
            if tail := next(covering, None):
                found[tail] = None
    if not piece or not found:
        raise UserError(f"{piece!r} ends nothing in this tokenizer, which does not write it; name another stop")
    return tuple(found)


def single_token(tokenizer: Tokenizer, piece: str) -> int:
    """The id of a piece that must be one token. UserError names it and what it splits into."""
    known = tokenizer.token_id(piece)
    ids = [known] if known is not None else encode_continuation(tokenizer, piece)
    if len(ids) != 1:
        raise UserError(f"{piece!r} is {len(ids)} tokens ({ids}) in this tokenizer; name a piece that is one")
    return ids[0]


def pad(rows: Sequence[Sequence[int]], length: int, side: str = "right") -> Tokens:
    """Ragged ids -> Tokens [B, length] of NumPy arrays. UserError when a row is longer."""
    longest = max(map(len, rows), default=0)
    if longest > length:
        raise UserError(f"a row of {longest} tokens does not fit {length}; raise the limit or drop the row")
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, where], mask[i, where] = row, True
    return Tokens(tokens, mask)
