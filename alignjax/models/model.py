"""The interface of a language model: a record of pure functions.

Shape letters: B rows, T tokens, D model width, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from alignjax.types import Array, Completion, Key, Params, Process, Prompt, Rules


class Model(NamedTuple):
    """A language model, decoder-only or encoder-decoder.

    Every function selects the parameters that it knows by name. Other entries at the top level of ``params``, such as
    a value head, change nothing.
    """

    config: Any
    """A TransformerConfig or a T5Config."""
    init: Callable[[Key], Params]
    """key -> randomly initialised parameters, float32."""
    forward: Callable[[Params, Array, Array], Array] | None
    """(params, tokens [B, T], segments [B, T]) -> states [B, T, D], each after its token and all earlier ones.

    Segment 0 is padding. A token attends only to its own segment, so that several texts can share a row. None for an
    encoder-decoder, which reads a prompt and writes a completion.
    """
    completion_states: Callable[[Params, Prompt, Completion], Array]
    """(params, prompt, completion) -> [B, T, D]: the state that predicts each completion token."""
    last_state: Callable[[Params, Prompt], Array]
    """(params, prompt) -> [B, D]: the state that predicts the first token after the prompt."""
    logits: Callable[[Params, Array], Array]
    """(params, states [..., D]) -> logits [..., V], float32."""
    prefill: Callable[[Params, Prompt, int], Process]
    """(params, prompt, max_new_tokens) -> the process that continues the prompt by at most ``max_new_tokens`` tokens.

    The prompt is read once, into a cache with room for the new tokens.
    """
    rules: Rules
    """The sharding rules of the parameters that ``init`` returns."""


def tempered(model: Model, temperature: float) -> Model:
    """Returns the model whose next token has probabilities softmax(logits / temperature), in log-probs and in drawing.

    The log-probs of what it draws are its own: it is another policy over the same parameters.
    """
    if temperature == 1:
        return model

    def logits(params: Params, states: Array) -> Array:
        return model.logits(params, states) / temperature

    def prefill(params: Params, prompt: Prompt, max_new_tokens: int) -> Process:
        process = model.prefill(params, prompt, max_new_tokens)

        def step(carry: Any, token: Array, /) -> tuple[Any, Array]:
            carry, logits = process.step(carry, token)
            return carry, logits / temperature

        return Process(step, process.carry, process.logits / temperature)

    return model._replace(logits=logits, prefill=prefill)
