"""Cycles among the replies to one prompt: what a preference model can express and a reward cannot (2312.00886).

Probabilities are [N, K, K]: N prompts, K replies to each, P(y_i > y_j | x). Of two replies i < j the entry [i, j] is
read; the other side's probability is 1 minus it.
"""

from __future__ import annotations

import itertools

import numpy as np


def triple_links(p: np.ndarray) -> np.ndarray:
    """Returns P(y_i > y_j), P(y_j > y_k), P(y_k > y_i) of the T = K choose 3 triples i < j < k: [N, K, K] -> [N, T, 3].

    A triple is a cycle where all three are above 1/2, or all three below it.
    """
    triples = list(itertools.combinations(range(p.shape[-1]), 3))
    i, j, k = np.array(triples, int).reshape(-1, 3).T
    return np.stack([p[:, i, j], p[:, j, k], 1 - p[:, i, k]], -1)


def cycles(p: np.ndarray, threshold: float) -> np.ndarray:
    """Returns 1 where y_i > y_j > y_k > y_i, -1 where y_i < y_j < y_k < y_i, else 0: [N, K, K] -> [N, T].

    All three probabilities of a cycle are more than ``threshold`` away from 1/2. P(y > y') = sigmoid(r(y) - r(y'))
    has none: the logits of a triple's links sum to 0.
    """
    margins = triple_links(p) - 0.5
    return np.all(margins > threshold, -1).astype(int) - np.all(margins < -threshold, -1).astype(int)


def weakest_links(p: np.ndarray) -> np.ndarray:
    """Returns the least of the probabilities of the three winners of each triple, in [1/2, 1]: [N, K, K] -> [N, T]."""
    return 0.5 + np.min(np.abs(triple_links(p) - 0.5), -1)
