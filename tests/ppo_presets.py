"""What PPO for language models leaves open, and how three public sources settle it: for ``tests/ppo_reference.py``.

The sources are mirrored, faults included. A docstring names file and function, a comment behind a setting the lines:

    O   openai/lm-human-preferences@cbfd210               lm_human_preferences/train_policy.py; others in that folder
    T   vwxyzjn/summarize_from_feedback_details@ee77a9a   summarize_from_feedback_details/ppo.py
    A   tatsu-lab/alpaca_farm@30717dd                     src/alpaca_farm/rl/ppo_trainer.py; others in src/alpaca_farm
    RLCD's trainer is A with facebookresearch/RLCD@fac0b8f alpaca-farm-modifications.patch

A reply has T columns and is padded on the right; its end marker is a real token. Masks are [B, T].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray


def k1(log_ratio: Array) -> Array:
    """Returns log r' with r' = pi / mu, from log_ratio = log pi - log mu of y ~ pi: E[k1] = KL (O:compute_rewards)."""
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """Returns (log r')^2 / 2: the KL to second order in the difference of the policies."""
    return log_ratio**2 / 2


def k3(log_ratio: Array) -> Array:
    """Returns (1/r' - 1) + log r' >= 0: E[k3] = KL where mu has no mass outside pi."""
    return np.expm1(-log_ratio) + log_ratio


def clamped(log_ratio: Array) -> Array:
    """Returns max(log r', 0): at least the KL in expectation (A:_shape_reward)."""
    return np.maximum(log_ratio, 0)


def everything(mask: Array) -> Array:
    """Returns a mask of all columns, padding too."""
    return np.ones_like(mask)


def real(mask: Array) -> Array:
    """Returns the mask of the real tokens."""
    return mask


def one_more(mask: Array) -> Array:
    """Returns the mask of the real tokens and of the column after them (T:padding_mask_p1, inverted)."""
    return np.concatenate([np.ones_like(mask[:, :1]), mask[:, :-1]], 1)


def last_column(mask: Array) -> Array:
    """Returns T - 1 for each row, [B] (O:compute_rewards)."""
    return np.full(len(mask), mask.shape[1] - 1)


def last_token(mask: Array) -> Array:
    """Returns the column of the last real token, [B] (A:_shape_reward)."""
    return mask.sum(1) - 1


def after_last_token(mask: Array) -> Array:
    """Returns the column after the last real token; where there is none, the last token's, [B] (T:actual_end)."""
    return np.minimum(mask.sum(1), mask.shape[1] - 1)


def replaced(scores: Array, finished: Array, penalty: float) -> Array:
    """Returns the penalty in place of the score of a reply that did not end, [B] (O:penalize, T:666, A:post_reward)."""
    return np.where(finished, scores, penalty)


def added(scores: Array, finished: Array, penalty: float) -> Array:
    """Returns the score plus the penalty for a reply that did not end, [B]."""
    return scores + np.where(finished, 0.0, penalty)


def masked_mean(x: Array, mask: Array) -> float:
    """Returns sum x m / sum m."""
    return float((x * mask).sum() / mask.sum())


def whiten_by_variance(x: Array, mask: Array, keep_mean: bool) -> Array:
    """Returns (x - mean) / sqrt(variance + 1e-8) (+ mean); both over the mask, without Bessel's correction.

    O:utils/core.py:whiten, T:masked_whiten.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return (x - mean) / np.sqrt(variance + 1e-8) + mean * keep_mean


def whiten_by_deviation(x: Array, mask: Array, keep_mean: bool) -> Array:
    """Returns (x - mean) / (deviation + 1e-8) (+ mean), as ``whiten_by_variance`` (A:torch_ops.py:whiten)."""
    mean = masked_mean(x, mask)
    deviation = np.sqrt(masked_mean((x - mean) ** 2, mask))
    return (x - mean) / (deviation + 1e-8) + mean * keep_mean


def linear(step: int, steps: int) -> float:
    """Returns 1 - step / steps; constant within a step (O:train_minibatch, T:575)."""
    return 1 - step / steps


def warm_linear(step: int, steps: int) -> float:
    """Returns step / 5 in the first five steps, 0 in the first one; then a line to 0 (A:rl/rl_trainer.py:step)."""
    return step / 5 if step < 5 else (steps - step) / (steps - 5)


def constant(step: int, steps: int) -> float:
    """Returns 1."""
    return 1.0


def adam(mean: Array, square: Array, count: int, eps: float) -> Array:
    """Returns m^ / (sqrt(v^) + eps), both moments corrected for their start at 0: torch's and optax's form."""
    return mean / (1 - 0.9**count) / (np.sqrt(square / (1 - 0.999**count)) + eps)


def adam_tensorflow(mean: Array, square: Array, count: int, eps: float) -> Array:
    """Returns sqrt(1 - b2^t) / (1 - b1^t) m / (sqrt(v) + eps): eps is not corrected (O:utils/core.py:minimize)."""
    return np.sqrt(1 - 0.999**count) / (1 - 0.9**count) * mean / (np.sqrt(square) + eps)


class AdaptiveKL(NamedTuple):
    """c <- c (1 + clip(KL / target - 1, -0.2, 0.2) rows / horizon) after each step (O:AdaptiveKLController).

    KL: nats a reply, the mean over rows of the sum of ``Settings.kl``. A:AdaptiveKLController has horizon = 10 rows.
    """

    target: float
    horizon: float

    def __call__(self, coefficient: float, kl: float, rows: int) -> float:
        """Returns the coefficient of the next step."""
        return coefficient * (1 + np.clip(kl / self.target - 1, -0.2, 0.2) * rows / self.horizon)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a step of PPO does. The fields without a word are the hyperparameters of their names."""

    kl: Callable[[Array], Array]
    kl_coefficient: float
    adaptive_kl: AdaptiveKL | None
    temperature: float  # logits are divided by it in every log-prob, the reference's too
    penalty: float | None
    unfinished: Callable[[Array, Array, float], Array]  # what the penalty does to the score
    score_place: Callable[[Array], Array]
    scored: Callable[[Array], Array]  # mask -> where log-probs count; elsewhere old, new and reference are equal
    averaged: Callable[[Array], Array]  # mask -> whitening of advantages, mean of the policy's loss
    valued: Callable[[Array], Array]  # mask -> values (0 elsewhere), whitening of rewards, mean of the critic's loss
    measured: Callable[[Array], Array]  # mask -> means of the approximate KL and the clip fraction
    whiten: Callable[[Array, Array, bool], Array]
    whiten_rewards: bool
    per_minibatch: bool  # whiten over the rows of the minibatch, rewards and advantages; else over the rollout
    discount: float
    lam: float
    clip: float
    value_clip: float
    value_coefficient: float
    micro_rows: int | None  # the loss is the mean over blocks of so many rows of the blocks' token means
    epochs: int
    minibatches: int
    learning_rate: float
    schedule: Callable[[int, int], float]
    adam: Callable[[Array, Array, int, float], Array]
    eps: float
    weight_decay: float  # decoupled, times the learning rate
    max_grad_norm: float | None


OPENAI_2019 = Settings(
    kl=k1,  # O:150
    kl_coefficient=0.15,  # launch.py:129
    adaptive_kl=AdaptiveKL(target=6.0, horizon=10_000),  # launch.py:131, O:28
    temperature=0.7,  # launch.py:17, policy.py:121
    penalty=-1.0,  # lm_tasks.py:32
    unfinished=replaced,  # O:390
    score_place=last_column,  # O:153
    scored=everything,  # tokens after the truncation stay: O:291 truncates for the reward model alone
    averaged=everything,  # O:338, 354
    valued=everything,  # O:325, 347
    measured=everything,  # O:355, 360
    whiten=whiten_by_variance,  # utils/core.py:338
    whiten_rewards=True,  # O:58
    per_minibatch=True,  # O:319-338: whitening is in the loss
    discount=1.0,  # O:56
    lam=0.95,  # O:57
    clip=0.2,  # O:54
    value_clip=0.2,  # O:55
    value_coefficient=0.1,  # O:53
    micro_rows=None,
    epochs=4,  # O:51
    minibatches=1,  # O:50
    learning_rate=1e-5,  # launch.py:122
    schedule=linear,  # O:172
    adam=adam_tensorflow,  # utils/core.py:627
    eps=1e-5,  # utils/core.py:627
    weight_decay=0.0,
    max_grad_norm=None,
)
TLDR_DETAILS = Settings(
    kl=k1,  # T:680
    kl_coefficient=0.05,  # T:51
    adaptive_kl=None,
    temperature=0.7,  # T:127; 1e-7 is added to it there
    penalty=-1.0,  # T:129
    unfinished=replaced,  # T:667
    score_place=after_last_token,  # T:684
    scored=real,  # T:675, 736
    averaged=real,  # T:703, 754
    valued=one_more,  # T:677, 689, 738, 747
    measured=everything,  # T:761, 764: padding counts
    whiten=whiten_by_variance,  # T:238
    whiten_rewards=False,  # T:50
    per_minibatch=False,  # T:703
    discount=1.0,  # T:48
    lam=0.95,  # T:49
    clip=0.2,  # T:46
    value_clip=0.2,  # T:47
    value_coefficient=0.1,  # T:45
    micro_rows=1,  # T:95; 16 at 1B and 4 at 2.8B (sbatches/ppo.sbatch)
    epochs=4,  # T:44
    minibatches=1,  # T:105
    learning_rate=3e-6,  # T:77
    schedule=linear,  # T:575
    adam=adam,  # T:500
    eps=1e-5,  # T:75
    weight_decay=0.01,  # the default of torch's AdamW, T:500
    max_grad_norm=None,
)
ALPACAFARM = Settings(
    kl=clamped,  # A:72
    kl_coefficient=0.0067,  # examples/scripts/rlhf_ppo.sh:7; RLCD: 0.001 to 0.032
    adaptive_kl=None,  # rl/ppo_utils.py:88
    temperature=1.0,  # rl/ppo_utils.py:84
    penalty=-1.0,  # rl/ppo_utils.py:57, used where stop tokens are set (A:200); RLCD: where the end marker lacks
    unfinished=replaced,  # A:223
    score_place=last_token,  # A:76
    scored=real,  # torch_ops.py:58: log-probs are 0 on padding
    averaged=everything,  # A:98, 252: padding counts
    valued=everything,  # A:87, 244: padding counts
    measured=everything,  # A:253, 258
    whiten=whiten_by_deviation,  # torch_ops.py:64
    whiten_rewards=True,  # rl/ppo_utils.py:75
    per_minibatch=False,  # A:190
    discount=1.0,  # rl/ppo_utils.py:73
    lam=1.0,  # rl/ppo_utils.py:74
    clip=0.2,  # rl/ppo_utils.py:71
    value_clip=0.2,  # rl/ppo_utils.py:72
    value_coefficient=0.1,  # rl/ppo_utils.py:70
    micro_rows=None,  # equal blocks and no mask: the mean of means is the mean
    epochs=2,  # rl/ppo_utils.py:69
    minibatches=2,  # 512 / 256, rl/ppo_utils.py:65
    learning_rate=1e-5,  # examples/scripts/rlhf_ppo.sh:22
    schedule=warm_linear,  # examples/scripts/rlhf_ppo.sh:23, rl_trainer.py:157
    adam=adam,  # rl/ppo_utils.py:46
    eps=1e-5,  # rl/ppo_utils.py:76
    weight_decay=0.0,
    max_grad_norm=1.0,  # rl_trainer.py:145, the default of transformers
)
DEFAULT = dataclasses.replace(
    ALPACAFARM,  # the numbers; the forms are the correct ones
    kl=k1,
    averaged=real,
    valued=real,
    measured=real,
    whiten=whiten_by_variance,
    whiten_rewards=False,
    lam=0.95,
    schedule=constant,
)
PRESETS = {
    "openai_2019": OPENAI_2019,
    "tldr_details": TLDR_DETAILS,
    "alpacafarm": ALPACAFARM,
    "default": DEFAULT,
}
