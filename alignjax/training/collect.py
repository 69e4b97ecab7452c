"""``collect(roles, prompts, key) -> PreferenceBatch``, one of the two pure functions of training.

Samplers draw K responses a prompt, the preference model compares them, and the reference scores those that the
objective reads. Nothing is recomputed that the sampler knew. Where policy and preference model have different
tokenizers, the responses become text between drawing and comparing (``alignjax.training.text_bridge``).
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from alignjax.models.model import Model
from alignjax.objectives import score_responses
from alignjax.preferences.preference_models import PreferenceModel, probability
from alignjax.sampling.process import StopSequences
from alignjax.sampling.samplers import Sampler, draw_responses, joint_process
from alignjax.training.learn import Assemble
from alignjax.types import (
    Array,
    Completion,
    Key,
    Objective,
    Params,
    PolicyFunctions,
    PreferenceBatch,
    Process,
    Prompt,
    Response,
    Roles,
    Sample,
    TrainState,
    preference_matrix,
    stack_rows,
)


class Frozen(NamedTuple):
    """The parameters that a stage reads and does not train. None: the stage has no such network."""

    base: Params | None = None  # under the trained adapters; None where the policy is trained whole
    reference: Params | None = None
    preference: Params | None = None  # of the preference model, its heads included


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceView:
    """What the preference model reads: its own tokens, without tokens that it never saw in training."""

    prompt: Prompt
    responses: tuple[Completion, ...]  # K of them
    # [B] bool each. With one tokenizer: it is not blank. With two: the task's filter keeps it.
    accepted: tuple[Array, ...]


def roles_of(state: TrainState, frozen: Frozen, assemble: Assemble) -> Roles:
    """Returns the parameters of every role at the state."""
    average = assemble(state.average, frozen) if state.average else {}
    return Roles(
        assemble(state.params, frozen), frozen.reference or {}, average, frozen.preference or {}, state.controls
    )


class Collector(NamedTuple):
    """How a batch is collected: everything but the parameters, the prompts and the key."""

    model: Model
    samplers: tuple[Sampler, ...]
    max_new_tokens: int
    stop: StopSequences
    unseen: tuple[int, ...]  # stop tokens that the preference model never saw in training
    blank: tuple[int, ...]  # tokens that are white space, or no text at all
    objective: Objective
    policy: PolicyFunctions
    preference: PreferenceModel
    unfinished_loses: bool

    def collect(self, roles: Roles, prompt: Prompt, key: Key) -> PreferenceBatch:
        """Draws, compares and scores, where policy and preference model share a tokenizer."""
        samples = self.draw(roles, prompt, key)
        return self.compare(roles, prompt, samples, self.view(prompt, samples))

    def draw(self, roles: Roles, prompt: Prompt, key: Key) -> tuple[Sample, ...]:
        """Returns one Sample of B rows for each sampler, at temperature 1 and without gradient."""

        def prefill(params: Params, prompt: Prompt) -> Process:
            return self.model.prefill(params, prompt, self.max_new_tokens)

        process = joint_process(prefill, roles, self.samplers, prompt)
        return lax.stop_gradient(draw_responses(process, len(self.samplers), key, self.max_new_tokens, self.stop))

    def view(self, prompt: Prompt, samples: tuple[Sample, ...]) -> PreferenceView:
        """Returns what the preference model reads, where it shares the policy's tokenizer.

        A blank response is not accepted: no labelled pair holds one. What else the task's filter would refuse is
        accepted.
        """
        responses = tuple(hide_tokens(sample.completion, self.unseen) for sample in samples)
        accepted = tuple(~is_blank(sample.completion, self.stop, self.blank) for sample in samples)
        return PreferenceView(prompt, responses, accepted)

    def compare(
        self, roles: Roles, prompt: Prompt, samples: tuple[Sample, ...], view: PreferenceView
    ) -> PreferenceBatch:
        """Returns the batch: the responses, how they compare, and their reference log-probs, without gradient.

        A response that the view does not accept loses to every other. So does one that met no stop sequence, where
        ``unfinished_loses``. Two such tie.
        """
        valid = [
            accepted & (sample.finished | (not self.unfinished_loses))
            for sample, accepted in zip(samples, view.accepted, strict=True)
        ]
        reward = rewards(self.preference, roles.preference, view) if self.preference.reward else None
        p = {
            (i, j): override_invalid(probability(self.logit(roles.preference, view, reward, i, j)), valid[i], valid[j])
            for i, j in self.objective.compared
        }
        responses = tuple(
            Response(sample.completion, sample.logp, None, sample.finished, ok)
            for sample, ok in zip(samples, valid, strict=True)
        )
        matrix = preference_matrix(p, len(prompt.tokens), len(samples))
        batch = PreferenceBatch(prompt, responses, matrix, reward, self.objective.compared)
        return complete_batch(self.objective, self.policy, roles, batch)

    def logit(self, params: Params, view: PreferenceView, reward: Array | None, i: int, j: int) -> Array:
        """Returns the logit of P(y_i > y_j), [B]; of a reward model the difference of rewards."""
        if reward is not None:
            return reward[:, i] - reward[:, j]
        return self.preference.logit(params, view.prompt, view.responses[i], view.responses[j])


def complete_batch(
    objective: Objective, policy: PolicyFunctions, roles: Roles, batch: PreferenceBatch
) -> PreferenceBatch:
    """Returns the batch with everything that the objective reads, without gradient; drawn and stored batches alike.

    The reference scores the responses that the objective reads, and the objective adds what must be computed before the
    policy moves.
    """
    logps = score_responses(policy.log_prob, roles.reference, batch, objective.scored)
    scored = dict(zip(objective.scored, logps, strict=True))
    responses = tuple(
        dataclasses.replace(response, reference_logp=scored.get(k)) for k, response in enumerate(batch.responses)
    )
    batch = dataclasses.replace(batch, responses=responses)
    return lax.stop_gradient(objective.extras.prepare(roles, batch, policy))


def rewards(preference: PreferenceModel, params: Params, view: PreferenceView) -> Array:
    """Returns r(x, y_k), [B, K] nats, of all responses in one pass of B * K rows."""
    assert preference.reward is not None
    count = len(view.responses)
    prompts, responses = stack_rows([view.prompt] * count), stack_rows(view.responses)
    return preference.reward(params, prompts, responses).reshape(-1, count)


def hide_tokens(completion: Completion, tokens: tuple[int, ...]) -> Completion:
    """Returns the completion with these tokens masked: stop tokens that the preference model never saw in training."""
    shown = ~jnp.isin(completion.tokens, jnp.asarray(tokens, jnp.int32))
    return Completion(completion.tokens, completion.mask & shown)


def is_blank(completion: Completion, stop: StopSequences, blank: tuple[int, ...]) -> Array:
    """Returns whether only ``blank`` tokens stand in a completion [B, T] before its end or its stop sequence, [B] bool.

    Text inside the stop sequence does not count. The real tokens stand at the left of every row.
    """
    position, count = jnp.arange(completion.tokens.shape[1])[None], jnp.sum(completion.mask, -1, keepdims=True)
    text = completion.mask & ~jnp.isin(completion.tokens, jnp.asarray(blank, jnp.int32))

    def blank_before(ending: tuple[int, ...]) -> Array:
        start = count - len(ending)  # [B, 1]
        tail = jnp.take_along_axis(completion.tokens, start + jnp.arange(len(ending))[None], 1, mode="clip")
        ends_so = (start[:, 0] >= 0) & jnp.all(tail == jnp.asarray([ending], jnp.int32), -1)
        return ends_so & ~jnp.any(text & (position < start), -1)

    return jnp.any(jnp.stack([blank_before(ending) for ending in ((), *stop)]), 0)


def override_invalid(p: Array, first: Array, second: Array) -> Array:
    """Returns p [B] where both responses are valid [B] bool; 1 or 0 where one is; 1/2 where neither is."""
    return jnp.where(first & second, p, 0.5 + 0.5 * (first.astype(p.dtype) - second.astype(p.dtype)))
