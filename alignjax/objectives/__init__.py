"""Loss x batch -> objective: the only place where losses meet models.

An objective is a loss with its hyperparameters and an adapter. The adapter scores the responses that the loss reads
under the trained parameters and hands arrays to it. Drawn responses and pairs on disk have one form, PreferenceBatch.
A policy gradient needs responses that the policy itself has drawn; direct alignment runs on both.
"""

from alignjax.objectives.direct import DirectAlignment, IterativeAlignment, OpponentAlignment
from alignjax.objectives.group import GroupGradient
from alignjax.objectives.ppo import PPO, KLTarget
from alignjax.objectives.preference import PreferenceGradient, RewardGradient
from alignjax.objectives.scoring import (
    pay_invalid,
    require_behavior,
    require_reference,
    require_rewards,
    response_metrics,
    score_responses,
)
from alignjax.objectives.supervised import (
    NEXT_TOKEN_MEANINGS,
    PREFERENCE_MEANINGS,
    next_token_loss,
    packed_next_token_loss,
    preference_loss,
)

__all__ = [
    "NEXT_TOKEN_MEANINGS",
    "PPO",
    "PREFERENCE_MEANINGS",
    "DirectAlignment",
    "GroupGradient",
    "IterativeAlignment",
    "KLTarget",
    "OpponentAlignment",
    "PreferenceGradient",
    "RewardGradient",
    "next_token_loss",
    "packed_next_token_loss",
    "pay_invalid",
    "preference_loss",
    "require_behavior",
    "require_reference",
    "require_rewards",
    "response_metrics",
    "score_responses",
]
