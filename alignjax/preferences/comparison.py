"""What a preference model says of several replies to each of many prompts, and how right it is.

Probabilities are [N, K, K]: N prompts, K replies to each. The entry [i, j] is P(y_i > y_j | x) with y_i shown first, so
[i, j] and [j, i] sum to 1 only where the model has no position bias; the diagonal is 1/2 and not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignjax.preferences import transitivity
from alignjax.preferences.judges import LARGEST_ENTROPY, calibration, cross_entropies
from alignjax.preferences.preference_models import probability
from alignjax.preferences.statistics import PromptMean, prompt_mean
from alignjax.types import Judge


def every_pair(
    judge: Judge, prompts: Sequence[str], replies: Sequence[Sequence[str]], both_orders: bool, batch: int
) -> np.ndarray:
    """Returns what the judge says of every two of the K replies to each prompt, [N, K, K].

    With ``both_orders`` it is asked twice, and the orders stand at the same places of their batches: an odd logit then
    gives P + P' = 1 to the bit. Else it is asked with y_i first, i < j, and the other entry is 1 minus the answer.
    """
    p = np.full((len(prompts), *[len(replies[0])] * 2), 0.5)
    i, j = (side.tolist() for side in np.triu_indices(p.shape[-1], 1))
    texts = [(x, own[a], own[b]) for x, own in zip(prompts, replies, strict=True) for a, b in zip(i, j, strict=True)]
    count = len(texts)
    if both_orders:
        texts += [texts[-1]] * (-count % batch)
        texts += [(x, second, first) for x, first, second in texts]
    answers = judge(*(list(column) for column in zip(*texts, strict=True)))
    p[:, i, j] = answers[:count].reshape(len(prompts), -1)
    backward = answers[len(texts) // 2 :][:count] if both_orders else 1 - answers
    p[:, j, i] = backward.reshape(len(prompts), -1)
    return p


def order_bias(p: np.ndarray) -> dict[str, PromptMean]:
    """Returns the mean of P(y > y') + P(y' > y) - 1, and the share of pairs whose winner changes with the order.

    Above 0 the model favours what it is shown first. A tie in one order alone counts as another winner.
    """
    i, j = np.triu_indices(p.shape[-1], 1)
    one, other = p[:, i, j], p[:, j, i]
    counts = np.full(len(p), len(i))
    changed = np.sign(one - 0.5) != np.sign(0.5 - other)
    return {
        "position_bias": prompt_mean(np.sum(one + other - 1, 1), counts, (-1, 1)),
        "changed": prompt_mean(np.sum(changed, 1), counts, (0, 1)),
    }


def agreement_with(p: np.ndarray, truth: np.ndarray) -> dict[str, PromptMean | float]:
    """Returns how right the probabilities are, each pair asked once.

    Accuracy is over the pairs that the truth does not tie; a tie of the model counts 1/2. Calibration error and
    cross-entropy (nats a pair) are against the truth's probabilities, over all pairs.
    """
    i, j = np.triu_indices(p.shape[-1], 1)
    p, truth = p[:, i, j], truth[:, i, j]
    decided = truth != 0.5
    right = np.where(p == 0.5, 0.5, (p > 0.5) == (truth > 0.5)) * decided
    return {
        "accuracy": prompt_mean(np.sum(right, 1), np.sum(decided, 1), (0, 1)),
        "calibration_error": calibration(p.ravel(), truth.ravel())["calibration_error"],
        "cross_entropy": prompt_mean(
            np.sum(cross_entropies(p, truth), 1), np.full(len(p), len(i)), (0, LARGEST_ENTROPY)
        ),
    }


def cyclicity(p: np.ndarray, threshold: float) -> dict[str, PromptMean]:
    """Returns the share of the triples that are ``transitivity.cycles``, and the mean of their weakest links."""
    found = transitivity.cycles(p, threshold) != 0
    counts = np.sum(found, 1)
    weakest = np.sum(transitivity.weakest_links(p) * found, 1)
    return {
        "cyclic": prompt_mean(counts, np.full(len(p), found.shape[1]), (0, 1)),
        "weakest_link": prompt_mean(weakest, counts, (0.5, 1)),
    }


def reproduced_cycles(p: np.ndarray, truth: np.ndarray, threshold: float) -> PromptMean:
    """Returns the share of the truth's cycles that are cycles in p too, in the same direction."""
    own, wanted = transitivity.cycles(p, threshold), transitivity.cycles(truth, threshold)
    hits = (own == wanted) & (wanted != 0)
    return prompt_mean(np.sum(hits, 1), np.sum(wanted != 0, 1), (0, 1))


def best_reward_model(truth: np.ndarray) -> np.ndarray:
    """Returns P(y_i > y_j) by the rewards that fit the truth best, for each prompt alone, [N, K, K].

    They minimise the cross-entropy of the pairs of one prompt, so no reward model has a lower one on these replies.
    Another reward may be right about more of the pairs.
    """
    from alignjax.games import game, zoo  # SciPy's optimisers: only the end of a run needs them

    played = game.from_matrix(truth)
    rewards = zoo.bradley_terry_rewards(played, played.log_mu)
    return np.asarray(probability(rewards[:, :, None] - rewards[:, None, :]), np.float64)


def model_figures(p: np.ndarray, truth: np.ndarray | None, threshold: float) -> dict[str, PromptMean | float]:
    """Returns all of these figures of one model; those against the truth only where it is known."""
    figures: dict[str, PromptMean | float] = {**order_bias(p), **cyclicity(p, threshold)}
    if truth is None:
        return figures
    return {**agreement_with(p, truth), **figures, "reproduced": reproduced_cycles(p, truth, threshold)}
