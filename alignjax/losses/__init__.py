"""Losses: equations on arrays. They know no models, no batches and no keys.

``supervised`` learns from labels, ``direct`` from log-ratios of whole responses, ``policy_gradient`` from the tokens of
drawn responses, ``ppo`` from the same with a critic or a group. A loss returns one value a row, [B], or a token,
[B, T].
"""

from alignjax.losses.direct import dpo, ipo, online_ipo
from alignjax.losses.policy_gradient import nash_md, regularized_policy_gradient, reinforce, reward_to_go
from alignjax.losses.ppo import (
    adapted_coefficient,
    all_places,
    below_the_lowest,
    clamped_k1,
    clipped_gradient,
    clipped_value_loss,
    generalized_advantage,
    group_centered,
    group_standardized,
    grpo,
    k1,
    k2,
    k3,
    last_place,
    leave_one_out,
    masked_mean,
    mean_of_sums,
    one_past_the_end,
    real_tokens,
    replaced_rewards,
    score_function,
    sequence_mean,
    token_rewards,
    whiten,
)
from alignjax.losses.supervised import next_token, preference_cross_entropy, sequence_sum

__all__ = [
    "adapted_coefficient",
    "all_places",
    "below_the_lowest",
    "clamped_k1",
    "clipped_gradient",
    "clipped_value_loss",
    "dpo",
    "generalized_advantage",
    "group_centered",
    "group_standardized",
    "grpo",
    "ipo",
    "k1",
    "k2",
    "k3",
    "last_place",
    "leave_one_out",
    "masked_mean",
    "mean_of_sums",
    "nash_md",
    "next_token",
    "one_past_the_end",
    "online_ipo",
    "preference_cross_entropy",
    "real_tokens",
    "regularized_policy_gradient",
    "reinforce",
    "replaced_rewards",
    "reward_to_go",
    "score_function",
    "sequence_mean",
    "sequence_sum",
    "token_rewards",
    "whiten",
]
