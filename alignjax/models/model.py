"""A language model as a record of pure functions, whatever is behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from alignjax.types import Array, Completion, Key, Params, Prompt, Rules, Step


class Start(NamedTuple):
    """A prefilled prompt: a Step, its first carry and the first logits [B, V]."""

    step: Step
    carry: Any
    logits: Array


class Model(NamedTuple):
    """A language model as pure functions, decoder-only or encoder-decoder."""

    config: Any  # a TransformerConfig or a T5Config
    init: Callable[[Key], Params]
    causal: Callable[[Params, Array, Array], Array] | None
    """(params, tokens [B, T], segments [B, T]) -> states [B, T, D]. Segment 0 is padding; a token
    attends to earlier tokens of its own segment alone, so several texts can share a row. None: an encoder-decoder,
    which reads a prompt and writes a completion."""
    predict: Callable[[Params, Prompt, Completion], Array]
    """(params, prompt, completion) -> [B, T, D]: the state that predicts each completion token."""
    final: Callable[[Params, Prompt], Array]
    """(params, prompt) -> [B, D]: the state after each row's last token; an encoder-decoder's before it writes."""
    unembed: Callable[[Params, Array], Array]
    """(params, states [..., D]) -> logits [..., V], float32."""
    start: Callable[[Params, Prompt, int], Start]
    """(params, prompt, tokens to come) -> the process that continues the prompt."""
    rules: Rules
