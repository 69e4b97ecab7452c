"""A new loss as an experiment: the quickstart with one more arm, made by ``replace``.

    alignjax run experiments/log_odds.py --workdir runs/log_odds [--set small=True]

notebooks/new_objective.ipynb invents the same function.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

import alignjax as aj

quickstart = aj.load_module(Path(__file__).with_name("quickstart.py"))


def log_odds(logp, reference_logp, mask, preference, *, tau):
    """Returns the policy gradient's loss [B] on the log-odds of winning, log p / (1 - p), instead of p."""
    gain = jnp.log(preference / (1 - preference)).clip(-3, 3)
    return aj.losses.regularized_policy_gradient(logp, reference_logp, mask, gain, tau=tau)


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the quickstart with the arm log_odds in place of self_play."""
    config = quickstart.get_config(small)
    arm = replace(config.stages["nash_md"], objective=aj.PreferenceGradient(partial(log_odds, tau=0.1)))
    table = replace(config.stages["table"], policies={n: n for n in ("base", "nash_md", "log_odds")})
    del config.stages["self_play"], config.stages["table"]  # so that the table comes last
    return config.with_stages(log_odds=arm, table=table)
