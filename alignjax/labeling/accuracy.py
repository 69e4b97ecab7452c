"""How often simulated labels are right, in closed form (2307.12950 App. N)."""

from __future__ import annotations

import numpy as np


def rlaif_accuracy(quality: float = 1.0, noise: float = 1.0, hard: float = np.inf) -> float:
    """Returns how often an AI annotator labels right: qualities A_i ~ N(m, quality^2) with one mean,
    the label is the sign of the difference of A_i + N(0, noise^2); of pairs with |A_1 - A_2| <= hard.

    With z = (A_1 - A_2) / (sqrt 2 quality), a = hard / (sqrt 2 quality), b = quality / noise and Owen's T:
    2 int_0^a phi(z) Phi(b z) dz / (2 Phi(a) - 1) = (Phi(a) - 2 T(a, b) - 1/2 + atan(b) / pi) / (2 Phi(a) - 1).
    """
    from scipy import special  # here, as below: theory, which no run needs

    a, b = hard / (np.sqrt(2) * quality), quality / noise
    right = special.ndtr(a) - 2 * special.owens_t(a, b) - 0.5 + np.arctan(b) / np.pi
    return float(right / (2 * special.ndtr(a) - 1))


def rlcd_accuracy(gap: float, quality: float = 1.0, hard: float = np.inf) -> float:
    """Returns how often the prompt labels right: the positive prompt's mean quality is ``gap`` above
    the negative one's, the label is which prompt; P(A_1 > A_2), of pairs with |A_1 - A_2| <= hard."""
    from scipy import special

    low, middle, high = (special.ndtr((d - gap) / (np.sqrt(2) * quality)) for d in (-hard, 0.0, hard))
    return float((high - middle) / (high - low))
