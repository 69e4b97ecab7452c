"""Losses: equations on arrays. They know no models, no batches and no keys.

``supervised`` learns from labels, ``direct`` from log-ratios of whole responses, ``policy_gradient`` from the tokens of
drawn responses. Every loss returns one value a row, [B]; the caller takes the mean.
"""

from alignjax.losses.direct import dpo, ipo, online_ipo
from alignjax.losses.policy_gradient import nash_md, regularized_policy_gradient, reinforce, reward_to_go
from alignjax.losses.supervised import next_token, preference_cross_entropy, sequence_sum

__all__ = [
    "dpo",
    "ipo",
    "nash_md",
    "next_token",
    "online_ipo",
    "preference_cross_entropy",
    "regularized_policy_gradient",
    "reinforce",
    "reward_to_go",
    "sequence_sum",
]
