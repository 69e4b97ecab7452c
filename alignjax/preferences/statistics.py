"""Statistics of an evaluation: intervals, length control, agreement with people, diversity, perplexity.

Pure functions of texts and NumPy arrays. SciPy is imported inside them: only the end of a run needs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

PAPER_WORDS, PAPER_SAMPLE = 20, 10_000
"""2307.12950 measures distinct-n on the first 20 words of each output, 10,000 words together."""
LENGTH_RIDGE = 0.01
"""The penalty of ``length_controlled_rate`` is half of it times the square of the length coefficient."""


def clopper_pearson(wins: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Returns the exact binomial interval (Clopper and Pearson 1934); ``wins`` may be a half-integer, with ties."""
    from scipy import special

    tail = (1 - level) / 2
    low = special.betaincinv(wins, n - wins + 1, tail) if wins > 0 else 0.0
    high = special.betaincinv(wins + 1, n - wins, 1 - tail) if wins < n else 1.0
    return float(low), float(high)


def mean_interval(values: np.ndarray, bounds: tuple[float, float], level: float = 0.95) -> tuple[float, float]:
    """Returns Student's t interval of the mean of independent values [N], cut at their ``bounds``.

    The interval is mean +- t_{N-1} s / sqrt(N) with the unbiased s. One value a prompt makes it paired over prompts:
    give P(y > y') for a mean probability in (0, 1), and the difference of two such columns, in (-1, 1), to compare two
    policies. It is approximate, and has no width where all values agree: for votes use ``clopper_pearson``. One value
    alone says nothing: the interval is then ``bounds``.
    """
    from scipy import special

    if len(values) < 2:
        return bounds
    mean, error = np.mean(values), np.std(values, ddof=1) / np.sqrt(len(values))
    reach = special.stdtrit(len(values) - 1, (1 + level) / 2) * error
    return float(max(mean - reach, bounds[0])), float(min(mean + reach, bounds[1]))


class PromptMean(NamedTuple):
    """A mean over what several prompts have, with its 95% interval over the prompts; None where there is nothing."""

    value: float | None
    low: float
    high: float
    n: int  # what the mean is over


def prompt_mean(totals: np.ndarray, counts: np.ndarray, bounds: tuple[float, float]) -> PromptMean:
    """Returns R = sum(totals) / sum(counts), from the total and the count of each prompt, [N], with its interval.

    What one prompt has is not independent, so the interval is Student's over the prompts that have something: R +-
    t_{N-1} sqrt(N / (N-1) sum (total - R count)^2) / sum(counts), cut at the ``bounds``. Where all counts are equal it
    is ``mean_interval`` of the prompts' means. One prompt alone says nothing: the interval is then ``bounds``.
    """
    from scipy import special

    totals, counts = np.asarray(totals, np.float64)[counts > 0], counts[counts > 0]
    if not len(counts):
        return PromptMean(None, *bounds, 0)
    n, whole = len(counts), int(np.sum(counts))
    mean = float(np.sum(totals) / whole)
    if n < 2:
        return PromptMean(mean, *bounds, whole)
    error = np.sqrt(n / (n - 1) * np.sum((totals - mean * counts) ** 2)) / whole
    reach = float(special.stdtrit(n - 1, 0.975) * error)
    return PromptMean(mean, max(mean - reach, bounds[0]), min(mean + reach, bounds[1]), whole)


def length_controlled_rate(probability: np.ndarray, lengths: np.ndarray, others: np.ndarray) -> float:
    """Returns the win rate that the replies would have at the lengths of the others (AlpacaEval 2, 2404.04475).

    ``probability`` [N] are P(y > y' | x), votes or soft; ``lengths`` and ``others`` [N] are those of y and of y'. The
    model is P(y > y') = sigmoid(theta + phi tanh(d / s)), d the difference of the lengths and s its standard deviation,
    so the unit of length does not matter. The result is sigmoid(theta), its value at d = 0.

    The fit minimises the summed cross-entropy + ``LENGTH_RIDGE`` / 2 phi^2. The ridge keeps phi finite where length
    alone tells every winner. theta has none: without an effect of length the result is the mean probability. Two
    things differ from the source. It has a term for the difficulty of each instruction, fitted on a pool of models,
    which is left out here. It chooses the penalty, of the absolute values, by cross-validation, and adds matches of
    altered baselines with a small weight.

    Exchanging the policies gives exactly 1 minus the result, where 1 - P has no rounding. Where all differences are the
    same, and where every P is 0 or every P is 1, the result is the mean probability: length explains nothing there.
    """
    difference = np.asarray(lengths, np.float64) - np.asarray(others, np.float64)
    mean = float(np.mean(probability))
    if len(difference) < 2 or np.ptp(difference) == 0 or mean in (0.0, 1.0):
        return mean
    theta = _fit_length_model(np.asarray(probability) - 0.5, np.tanh(difference / np.std(difference, ddof=1)))
    half = 0.5 + 0.5 * float(np.tanh(abs(theta) / 2))  # 1 - half has no rounding
    return half if theta > 0 else 1 - half


def _fit_length_model(centred: np.ndarray, x: np.ndarray) -> float:
    """Returns theta of sigmoid(theta + phi x), fitted to ``centred`` [N] = P - 1/2 by Newton's method from 0.

    Every operation is odd or even in (centred, x), so that (-centred, -x) gives -theta to the bit. The loss is convex;
    a step is halved until it does not raise the loss.
    """

    def loss(theta: float, phi: float) -> float:
        logit = theta + phi * x
        entropy = np.logaddexp(logit / 2, -logit / 2) - centred * logit
        return float(np.sum(entropy)) + LENGTH_RIDGE / 2 * phi * phi

    theta = phi = 0.0
    for _ in range(100):
        half = np.tanh((theta + phi * x) / 2) / 2  # sigmoid - 1/2
        weight = (0.5 - half) * (0.5 + half)
        a, b, c = np.sum(weight), np.sum(weight * x), np.sum(weight * x * x) + LENGTH_RIDGE  # the Hessian
        u, v = np.sum(centred - half), np.sum((centred - half) * x) - LENGTH_RIDGE * phi
        if not (determinant := a * c - b * b) > 0:  # every probability is rounded to 0 or 1
            break
        steps = (c * u - b * v) / determinant, (a * v - b * u) / determinant
        scale = 1.0
        while scale > 1e-9 and loss(theta + scale * steps[0], phi + scale * steps[1]) > loss(theta, phi):
            scale /= 2
        if scale <= 1e-9 or max(map(abs, steps)) < 1e-12 * (1 + abs(theta) + abs(phi)):
            break
        theta, phi = theta + scale * steps[0], phi + scale * steps[1]
    return float(theta)


class HumanAgreement(NamedTuple):
    """How a preference model agrees with people on pairs that they compared (2307.12950, Table 5)."""

    accuracy: float  # share of the pairs with P(preferred > other) > 1/2, strictly
    low: float  # of its 95% Clopper-Pearson interval
    high: float
    mean_probability: float  # mean of P(preferred > other)
    n: int


def human_agreement(probability: np.ndarray) -> HumanAgreement:
    """Returns the agreement, from the P [N] of the replies that people preferred to the others.

    A tie, P = 1/2, is no agreement, as in the paper; ``preferences.judges.calibration`` counts it half.
    """
    right, n = int(np.sum(probability > 0.5)), len(probability)
    return HumanAgreement(right / n, *clopper_pearson(right, n), float(np.mean(probability)), n)


def distinct_n(texts: Sequence[str], n: int, max_words: int | None, sample_words: int | None) -> float:
    """Returns distinct-n (1510.03055): the share of different n-grams among all n-grams of words; 0 without any.

    Words are what white space separates. An n-gram lies in one text. ``max_words`` cuts every text to its first words;
    ``sample_words`` then keeps the first words of the texts together, because longer samples repeat more. None keeps
    all. 2307.12950 has ``PAPER_WORDS`` and ``PAPER_SAMPLE``, and divides by n-grams, as here: its distinct-3 of more
    than 18/20 rules out the division by words of 1510.03055.
    """
    grams: list[tuple[str, ...]] = []
    left = sample_words
    for text in texts:
        words = text.split()[:max_words][:left]
        grams += zip(*(words[i:] for i in range(n)), strict=False)
        left = None if left is None else left - len(words)
    return len(set(grams)) / len(grams) if grams else 0.0


def word_count(texts: Sequence[str], max_words: int | None) -> int:
    """Returns how many words ``distinct_n`` reads of the texts without ``sample_words``."""
    return sum(len(text.split()[:max_words]) for text in texts)


def perplexity(logp: np.ndarray, tokens: np.ndarray) -> float:
    """Returns exp(-sum log mu(y) / sum |y|) of replies: ``logp`` [N] nats under mu, ``tokens`` [N] of each reply.

    It is the exponential of the mean nats a token, long replies counting more; NaN where a log-prob is.
    """
    with np.errstate(over="ignore"):  # more than 709 nats a token: infinity
        return float(np.exp(-np.sum(logp) / np.sum(tokens)))
