"""Who writes the responses, as data: ``samplers=(policy, mixture(beta=0.125))`` is Nash-MD.

(policy, policy) is self-play and online IPO, (mixture(b), mixture(b)) is IPO-MD, (policy, reference) makes the policy a
best response to the reference, (policy, moving_average) is Nash-EMA.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.errors import UserError
from alignjax.sampling.process import StopSequences, geometric_mean, sample
from alignjax.types import Array, Key, Params, Process, Prompt, Role, Roles, Sample, stack_rows

Prefill = Callable[[Params, Prompt], Process]
"""(params, prompt) -> the process that continues the prompt."""


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Writes with the one-step-at-a-time mixture pi_role^(1-beta) mu^beta (2312.00886, Eq. 15 and App. F.1)."""

    role: Role
    beta: float = 0.0  # the weight of the reference

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise UserError(f"Sampler.beta={self.beta} must be in [0, 1]: it is the weight of the reference")

    def weights(self) -> dict[Role, float]:
        """Returns the weight of each network that it reads. At beta = 0 and 1 it reads one network alone."""
        parts = ((self.role, 1 - self.beta), (Role.REFERENCE, self.beta))
        return {role: weight for role, weight in parts if weight > 0}


policy = Sampler(Role.POLICY)
"""The policy itself."""
reference = Sampler(Role.REFERENCE)
"""The frozen reference mu."""
moving_average = Sampler(Role.AVERAGE)
"""The exponential moving average of the trained parameters (Nash-EMA); the stage sets its decay."""


def mixture(beta: float) -> Sampler:
    """Returns Nash-MD's opponent pi^(1-beta) mu^beta (2312.00886, Eq. 15); beta 0 is the policy, 1 the reference."""
    return Sampler(Role.POLICY, beta)


def joint_process(prefill: Prefill, roles: Roles, samplers: Sequence[Sampler], prompt: Prompt) -> Process:
    """Returns one process over B * K rows; row b * K + k is response k to prompt b (2312.00886, Eq. 15 and App. F.1).

    Each network prefills and steps once for all samplers that read it: Nash-MD takes one pass of 2 B rows of the policy
    and one of B rows of the reference a token. Rows of one prompt stay side by side, so that a sharded batch stays
    where it is.
    """
    weights = [sampler.weights() for sampler in samplers]
    readers = {role: [k for k, w in enumerate(weights) if role in w] for role in Role}
    readers = {role: numbers for role, numbers in readers.items() if numbers}
    processes = {role: prefill(roles[role], stack_rows([prompt] * len(numbers))) for role, numbers in readers.items()}

    def mix(logits: dict[Role, Array]) -> Array:
        rows = {role: x.reshape(-1, len(readers[role]), x.shape[-1]) for role, x in logits.items()}
        mixed = []
        for k, parts in enumerate(weights):
            logits_k = [rows[role][:, readers[role].index(k)] for role in parts]
            mixed.append(logits_k[0] if len(parts) == 1 else geometric_mean(logits_k, list(parts.values())))
        return jnp.stack(mixed, 1).reshape(-1, mixed[0].shape[-1])

    def step(carries: dict[Role, Any], token: Array) -> tuple[dict[Role, Any], Array]:
        tokens = token.reshape(-1, len(samplers))
        stepped = {
            role: process.step(carries[role], jnp.stack([tokens[:, k] for k in readers[role]], 1).reshape(-1))
            for role, process in processes.items()
        }
        return {role: carry for role, (carry, _) in stepped.items()}, mix({r: x for r, (_, x) in stepped.items()})

    carries = {role: process.carry for role, process in processes.items()}
    return Process(step, carries, mix({role: process.logits for role, process in processes.items()}))


def draw_responses(
    process: Process, count: int, key: Key, max_new_tokens: int, stop: StopSequences
) -> tuple[Sample, ...]:
    """Returns ``count`` = K samples of B rows each from a joint process, at temperature 1.

    Response k to prompt b is drawn with ``fold_in(fold_in(key, k), b)``.
    """
    rows = process.logits.shape[0] // count
    sampler_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(count))
    keys = jax.vmap(lambda row: jax.vmap(jax.random.fold_in, (0, None))(sampler_keys, row))(jnp.arange(rows))  # [B, K]
    drawn = sample(process, keys.reshape(-1), max_new_tokens, stop)

    def response(k: int) -> Sample:
        return jax.tree.map(lambda x: x.reshape(rows, count, *x.shape[1:])[:, k], drawn)

    return tuple(map(response, range(count)))
