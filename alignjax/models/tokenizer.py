"""Tokenizers as records of functions: text <-> token ids.

Text is the interface between models with different tokenizers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import jinja2
import numpy as np

from alignjax.errors import UserError, one_line
from alignjax.types import Tokens

Message = dict[str, str]
"""{"role": "user", "content": text}: one message of a chat."""

_ANCHORS = ("a", ".", "\n")
"""Texts to encode a continuation after: the first whose own ids stay the same before the continuation is taken."""
_PRECEDING = ("", ".", "!", "?", ",", ")", '"', "\n")
"""What can stand between a word and a stop piece; a tokenizer may merge it with the piece's first characters."""
_BYTES_PER_TOKEN = 4
_PROBE = "hello 8271"
"""A message that no template holds of its own."""


class Tokenizer(NamedTuple):
    """A tokenizer. Ids are ints in [0, vocab_size)."""

    encode: Callable[[str], list[int]]
    """text -> ids, after the tokens that the tokenizer puts before a text (BOS). It adds none at the end: an
    encoder-decoder appends its end token itself."""
    encode_bare: Callable[[str], list[int]]
    """text -> ids, nothing added."""
    decode_all: Callable[[Sequence[int]], str]
    """ids -> text, special tokens included."""
    token_id: Callable[[str], int | None]
    """piece -> its id where the vocabulary holds exactly this piece, else None."""
    vocab_size: int
    save: Callable[[Path], None]
    """Writes a Hugging Face tokenizer folder."""
    specials: Mapping[str, int] = MappingProxyType({})
    """Special tokens, {"bos_token_id": 1, ...}; only those that the tokenizer has."""
    end_tokens: tuple[int, ...] = ()
    """The tokens with which the model ends what it writes."""
    render: Callable[[Sequence[Message]], str] | None = None
    """The chat template: messages -> text that ends where the assistant's message begins. None: no template."""


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer for lengths alone, used where a model's own is not available.

    It encodes four bytes of text as one token, always token 0, and decodes every token as four bytes. Its ``save``
    raises UserError.
    """

    def encode(text: str) -> list[int]:
        return [0] * -(-len(text.encode()) // _BYTES_PER_TOKEN)

    def save(folder: Path) -> None:
        raise UserError(f"{folder}: a placeholder tokenizer cannot be saved; run with the model's own tokenizer")

    return Tokenizer(
        encode,
        encode,
        lambda ids: "?" * _BYTES_PER_TOKEN * len(ids),
        lambda piece: 0,
        vocab_size,
        save,
        end_tokens=(0,),
    )


def with_chat_template(tokenizer: Tokenizer, messages: Callable[[str], Sequence[Message]]) -> Tokenizer:
    """Returns the tokenizer with an ``encode`` that renders ``messages(prompt)`` by the chat template first.

    Raises UserError when the tokenizer has no chat template, or one that leaves out what the user says; its ``encode``
    raises UserError when the template fails, or leaves out the last message.
    """
    if tokenizer.render is None:
        raise UserError("chat=True, but the tokenizer has no chat template; use a chat model, or chat=False")
    render = tokenizer.render
    if not _renders_text(render):
        raise UserError("the chat template leaves out a message whose content is a text (it may want a list of parts); "
                        "use a template that writes texts, or set chat=False")  # fmt: skip

    def encode(prompt: str) -> list[int]:
        chat = messages(prompt)
        try:
            text = render(chat)
        except Exception as error:  # a template can raise an error of any type
            raise UserError(f"the chat template refuses {[message['role'] for message in chat]} ({one_line(error)}); "
                            "change the task's messages, or set chat=False") from None  # fmt: skip
        if chat[-1]["content"].strip() not in text:
            raise UserError(f"the chat template leaves out the message {chat[-1]['content'][:40]!r} of the role "
                            f"{chat[-1]['role']!r}; change the task's messages, or set chat=False")  # fmt: skip
        return tokenizer.encode_bare(text)

    return tokenizer._replace(encode=encode)


def _renders_text(render: Callable[[Sequence[Message]], str]) -> bool:
    """Whether a template writes what a user's message says. True too where it refuses a chat of this one message.

    Raises UserError on a text that is no template.
    """
    try:
        return _PROBE in render([{"role": "user", "content": _PROBE}])
    except jinja2.TemplateSyntaxError as error:
        raise UserError(f"the chat template is damaged ({one_line(error)}); correct it, or set chat=False") from None
    except Exception:  # of any kind: it may ask for a system's message, which the task's messages have
        return True


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the ids of a prompt. Raises UserError when there are none: a model writes after at least one token."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"the prompt {prompt[:40]!r} is no token, and this tokenizer puts nothing before a text; "
                        "leave it out, or write some text into it")  # fmt: skip
    return ids


def encode_continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of text that follows other text: no BOS, and no space that the tokenizer would add in front."""
    for anchor in _ANCHORS:
        anchor_ids = tokenizer.encode_bare(anchor)
        ids = tokenizer.encode_bare(anchor + text)
        if ids[: len(anchor_ids)] == anchor_ids:
            return ids[len(anchor_ids) :]
    return tokenizer.encode_bare(text)


def decode_continuation(tokenizer: Tokenizer, ids: Iterable[int]) -> str:
    """Returns the text of ids that follow other text; a leading space is kept."""
    return _continuation_decoder(tokenizer)(ids)


def _continuation_decoder(tokenizer: Tokenizer) -> Callable[[Iterable[int]], str]:
    anchor_ids = tokenizer.encode_bare(_ANCHORS[0])
    anchor = tokenizer.decode_all(anchor_ids)
    return lambda ids: tokenizer.decode_all([*anchor_ids, *map(int, ids)]).removeprefix(anchor)


def blank_tokens(tokenizer: Tokenizer, count: int) -> tuple[int, ...]:
    """Returns those of the first ``count`` tokens that are white space in the middle of a text, or no text at all.

    A model may have more tokens than its tokenizer; those are no text. White space that takes several tokens, such as
    U+3000 in bytes, is not found.
    """
    decode = _continuation_decoder(tokenizer)
    return tuple(token for token in range(count) if not decode([token]).strip())


def decode_reply(tokenizer: Tokenizer, ids: Sequence[int], stop: Sequence[Sequence[int]], end: str) -> str:
    """Returns the text of a completion.

    Where its last token is one of the tokenizer's end tokens and also a sequence of ``stop``, the task's ``end``
    marker replaces that token's text.
    """
    ended = len(ids) > 0 and ids[-1] in tokenizer.end_tokens and (ids[-1],) in stop
    return decode_continuation(tokenizer, ids[:-1]) + end if ended else decode_continuation(tokenizer, ids)


def stop_sequences(tokenizer: Tokenizer, piece: str) -> tuple[tuple[int, ...], ...]:
    """Returns the token sequences in which ``piece`` can end a text.

    A piece that is a token has one. Any other is encoded after a word and after several punctuation marks, since the
    tokenizer may merge those with it. Raises UserError when no sequence decodes to the piece.
    """
    token = tokenizer.token_id(piece)
    if token is not None:
        return ((token,),)
    sequences: dict[tuple[int, ...], None] = {}  # a set that keeps its order
    for preceding in _PRECEDING:
        if sequence := _shortest_ending(tokenizer, preceding, piece):
            sequences[sequence] = None
    if not piece or not sequences:
        raise UserError(f"the tokenizer cannot write the stop piece {piece!r} at the end of a text; name another")
    return tuple(sequences)


def _shortest_ending(tokenizer: Tokenizer, preceding: str, piece: str) -> tuple[int, ...] | None:
    """Returns the fewest last ids of "a" + preceding + piece whose text ends with the piece; None if there are none."""
    letter = tokenizer.encode_bare("a")
    ids = tokenizer.encode_bare(f"a{preceding}{piece}")
    if ids[: len(letter)] != letter:
        return None
    endings = (tuple(ids[first:]) for first in range(len(ids) - 1, len(letter) - 1, -1))
    return next((ending for ending in endings if decode_continuation(tokenizer, ending).endswith(piece)), None)


def single_token(tokenizer: Tokenizer, piece: str) -> int:
    """Returns the id of a piece that must be one token. Raises UserError when the piece is several."""
    token = tokenizer.token_id(piece)
    ids = [token] if token is not None else encode_continuation(tokenizer, piece)
    if len(ids) != 1:
        raise UserError(f"{piece!r} is {len(ids)} tokens ({ids}) in this tokenizer; name a piece that is one token")
    return ids[0]


def pad(rows: Sequence[Sequence[int]], length: int, side: str = "right") -> Tokens:
    """Returns rows of ids as Tokens [B, length] of NumPy arrays, padded on ``side`` with 0.

    Raises UserError when a row is longer than ``length``.
    """
    longest = max(map(len, rows), default=0)
    if longest > length:
        raise UserError(f"a row of {longest} tokens does not fit {length}; raise the limit or drop the row")
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, columns], mask[i, columns] = row, True
    return Tokens(tokens, mask)
