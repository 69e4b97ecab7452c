"""PPO as published code runs it, as data: objective, optimiser, loop and temperature, named after their source.

``aj.TrainPolicy(**presets.alpacafarm(steps=80)._asdict(), start=..., data=aj.OnlineData(samplers=(aj.policy,), ...))``

Each deviation from the correct form, which is ``aj.PPO`` with its defaults, is a value that stands here. What is left
out is how those programs work on several machines and in which units they count; each function says what else.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from alignjax import losses
from alignjax.objectives import PPO, KLTarget
from alignjax.training.loop import Loop
from alignjax.training.optimizer import Adam


class Preset(NamedTuple):
    """Fields of a TrainPolicy stage."""

    objective: PPO
    adam: Adam
    loop: Loop
    temperature: float


_NO_CLIPPING = 1e9  # of the gradient's norm
_MINUS_ONE = partial(losses.replaced_rewards, by=-1.0)  # whatever the offset of the reward model


def openai_2019(steps: int, batch: int = 512) -> Preset:
    """Returns the settings of 1909.08593 (openai/lm-human-preferences at cbfd210, ``train_policy.py``).

    tau follows the KL. Rewards are whitened with their mean kept, in each minibatch, as are advantages; the score is
    paid at the last place, and everything counts on all places, tokens or not. The critic is a head on the policy.
    There, a response is sampled on past its end.
    """
    objective = PPO(
        tau=0.15,
        invalid=_MINUS_ONE,
        target=KLTarget(6.0, 10_000.0),
        gae_lambda=0.95,
        score_places=losses.all_places,
        value_places=losses.all_places,
        policy_places=losses.all_places,
        whiten_rewards=partial(losses.whiten, keep_mean=True),
        whiten_minibatches=True,
    )
    adam = Adam(1e-5, warmup=0, schedule="linear", clip=_NO_CLIPPING, b2=0.999, eps=1e-5, corrected=False)
    return Preset(objective, adam, Loop(steps, batch, epochs=4, minibatches=1), 0.7)


def tldr_details(steps: int, batch: int = 512) -> Preset:
    """Returns the settings of 2403.17031 (vwxyzjn/summarize_from_feedback_details at ee77a9a, ``ppo.py``).

    The score is paid one place past the last token where there is room, and the critic is read there too. Its critic is
    a network of its own that begins as the reward model: ``critic=aj.Critic(..., head="reward")``. There, a minibatch's
    loss is the mean over micro-batches of their means: ``Loop.accumulate`` does that.
    """
    objective = PPO(
        tau=0.05,
        invalid=_MINUS_ONE,
        gae_lambda=0.95,
        score_places=losses.one_past_the_end,
        value_places=losses.one_past_the_end,
    )
    adam = Adam(
        3e-6, warmup=0, schedule="linear", clip=_NO_CLIPPING, b2=0.999, eps=1e-5, weight_decay=0.01
    )  # fmt: skip
    return Preset(objective, adam, Loop(steps, batch, epochs=4, minibatches=1), 0.7)


def alpacafarm(steps: int = 80, batch: int = 512, tau: float = 0.002) -> Preset:
    """Returns the settings of 2307.12950 (tatsu-lab/alpaca_farm at 30717dd, as facebookresearch/RLCD changes it).

    The KL is clamped at 0, so its mean is too large; rewards are whitened with their mean kept; whitening and means
    count padding; the first batch has learning rate 0. Its critic is the reward model's backbone with a new head:
    ``critic=aj.Critic(...)``. There, a response without end token runs on past its end marker.
    """
    objective = PPO(
        tau=tau,
        invalid=_MINUS_ONE,
        kl=losses.clamped_k1,
        gae_lambda=1.0,
        value_places=losses.all_places,
        policy_places=losses.all_places,
        whiten_rewards=partial(losses.whiten, keep_mean=True),
    )
    adam = Adam(1e-5, warmup=5, schedule="linear", clip=1.0, b2=0.999, eps=1e-5)
    return Preset(objective, adam, Loop(steps, batch, epochs=2, minibatches=2), 1.0)
