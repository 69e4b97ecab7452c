"""A new objective as an experiment: the quickstart with one more arm, made by ``replace``.

    alignjax run experiments/log_odds.py --workdir runs/log_odds [--set small=True]

The function is the one that notebooks/new_objective.ipynb invents.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp
from jax import lax

from alignjax.objectives import reward_to_go, sequence_sum
from alignjax.pipeline.config import load_module
from alignjax.pipeline.stages import Experiment

quickstart = load_module(Path(__file__).with_name("quickstart.py"))


def log_odds(params, rollout, key, *, log_prob, tau):
    """Policy gradient on the log-odds of winning, log p / (1 - p), instead of the probability."""
    mask, logp = rollout.y.mask, log_prob(params, rollout.prompt, rollout.y)
    ratio = lax.stop_gradient(logp) - rollout.ref_logp
    gain = jnp.log(rollout.p / (1 - rollout.p)).clip(-3, 3)
    advantage = gain[:, None] - tau * reward_to_go(jnp.where(mask, ratio, 0))
    loss = -jnp.mean(sequence_sum(logp * advantage, mask))
    return loss, {"preference": jnp.mean(rollout.p), "kl": jnp.mean(sequence_sum(ratio, mask))}


def get_config(small: bool = False) -> Experiment:
    config = quickstart.get_config(small)
    arm = replace(config.stages["nash_md"], objective=partial(log_odds, tau=0.1))
    table = replace(config.stages["table"], policies={n: n for n in ("base", "nash_md", "log_odds")})
    del config.stages["self_play"], config.stages["table"]  # so that the table comes last
    return config.with_stages(log_odds=arm, table=table)
