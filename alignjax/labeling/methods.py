"""From prompts to preference pairs without human labels (RLCD, 2307.12950)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from alignjax.errors import UserError
from alignjax.sampling.generate import Generate
from alignjax.tasks.task import Clean, Task


class Labeled(NamedTuple):
    """A pair as text, with what made it."""

    prompt: str  # the plain prompt, without affixes
    first: str
    second: str
    p: float  # P(first is preferred)
    affix: int  # index of the affix pair, -1 without one


Method = Callable[[Generate, Task, Sequence[str], Sequence[int], int], tuple[list[Labeled], int]]
"""(generate, task, prompts, example numbers, seed) -> (pairs, tries): what could not be had is left out. Before
anything runs it is asked for no prompts, so that it can refuse what it was given."""


def rlcd(
    generate: Generate, task: Task, prompts: Sequence[str], numbers: Sequence[int], seed: int, *, attempts: int = 5
) -> tuple[list[Labeled], int]:
    """RLCD (2307.12950 section 3): the answer under the positive affix is labelled preferred.

    One affix pair a prompt, drawn uniformly; earlier turns carry the opposite polarity. A side that the
    filter refuses is sampled again, at most ``attempts`` times in all; then the example is dropped. Which
    side is stored first is a coin.
    """
    if not task.affixes:
        raise UserError(f"task {task.name!r} has no affixes to contrast; give it some, or label in another way")
    draws = [np.random.default_rng((seed, number)) for number in numbers]
    affixes = [int(rng.integers(len(task.affixes))) for rng in draws]
    pairs = [task.affixes[i] for i in affixes]
    good = [task.contrast(x, plus, minus) for x, (plus, minus) in zip(prompts, pairs, strict=True)]
    bad = [task.contrast(x, minus, plus) for x, (plus, minus) in zip(prompts, pairs, strict=True)]
    (better, tries), (worse, more) = (
        filtered(generate, task.clean, side, numbers, i, attempts) for i, side in enumerate((good, bad))
    )
    labeled = []
    for x, y, z, affix, rng in zip(prompts, better, worse, affixes, draws, strict=True):
        if y is not None and z is not None:
            swapped = bool(rng.random() < 0.5)
            labeled.append(Labeled(x, z if swapped else y, y if swapped else z, float(not swapped), affix))
    return labeled, tries + more


def by_oracle(
    generate: Generate,
    task: Task,
    prompts: Sequence[str],
    numbers: Sequence[int],
    seed: int,
    *,
    oracle: str,
    error: float,
    attempts: int = 5,
) -> tuple[list[Labeled], int]:
    """Two answers to the plain prompt, labelled by one of the task's oracles as an annotator who errs with
    probability ``error``; ties are left out. With error 0 this is the truth that models are held to."""
    if oracle not in task.oracles:
        raise UserError(f"task {task.name!r} has no oracle {oracle!r}; it has {', '.join(task.oracles) or 'none'}")
    if not 0 <= error <= 1:
        raise UserError(f"error={error} is no probability; choose one from 0 to 1")
    (first, tries), (second, more) = (filtered(generate, task.clean, prompts, numbers, i, attempts) for i in range(2))
    labeled = []
    for x, y, z, number in zip(prompts, first, second, numbers, strict=True):
        p = 0.5 if y is None or z is None else task.oracles[oracle](x, y, z)
        if y is not None and z is not None and p != 0.5:
            wrong = np.random.default_rng((seed, number)).random() < error
            labeled.append(Labeled(x, y, z, 1 - p if wrong else p, -1))
    return labeled, tries + more


def filtered(
    generate: Generate, clean: Clean, prompts: Sequence[str], numbers: Sequence[int], side: int, attempts: int
) -> tuple[list[str | None], int]:
    """A clean reply to each prompt, or None after ``attempts`` tries or where the prompt is too long to answer;
    and how many tries were made."""
    replies: list[str | None] = [None] * len(prompts)
    left, tries = list(range(len(prompts))), 0
    for attempt in range(attempts):
        drawn = generate([prompts[i] for i in left], [numbers[i] for i in left], side * attempts + attempt)
        answered = [(i, reply) for i, reply in zip(left, drawn, strict=True) if reply]
        tries += len(answered)
        for i, reply in answered:
            replies[i] = clean(reply.text)
        left = [i for i, _ in answered if replies[i] is None]
        if not left:
            break
    return replies, tries


def rlaif_accuracy(quality: float = 1.0, noise: float = 1.0, hard: float = np.inf) -> float:
    """How often an AI annotator labels right (2307.12950 App. N): qualities A_i ~ N(m, quality^2) with one mean,
    the label is the sign of the difference of A_i + N(0, noise^2); of pairs with |A_1 - A_2| <= hard.

    With z = (A_1 - A_2) / (sqrt 2 quality), a = hard / (sqrt 2 quality), b = quality / noise and Owen's T:
    2 int_0^a phi(z) Phi(b z) dz / (2 Phi(a) - 1) = (Phi(a) - 2 T(a, b) - 1/2 + atan(b) / pi) / (2 Phi(a) - 1).
    """
    from scipy import special  # here, as below: theory, which no run needs

    a, b = hard / (np.sqrt(2) * quality), quality / noise
    right = special.ndtr(a) - 2 * special.owens_t(a, b) - 0.5 + np.arctan(b) / np.pi
    return float(right / (2 * special.ndtr(a) - 1))


def rlcd_accuracy(gap: float, quality: float = 1.0, hard: float = np.inf) -> float:
    """How often the prompt labels right (2307.12950 App. N): the positive prompt's mean quality is ``gap`` above
    the negative one's, the label is which prompt; P(A_1 > A_2), of pairs with |A_1 - A_2| <= hard."""
    from scipy import special

    low, middle, high = (special.ndtr((d - gap) / (np.sqrt(2) * quality)) for d in (-hard, 0.0, hard))
    return float((high - middle) / (high - low))
