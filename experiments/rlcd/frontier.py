"""Reward against KL: PPO, Nash-MD and the policy gradient without a critic, at equal numbers of samples.

    alignjax run experiments/rlcd/frontier.py --workdir runs/frontier

Each learns from RLCD's labels in the small world of ``sandbox.py``, at three temperatures tau: the stages before them
are that experiment's own. PPO learns twice from each batch, in two parts, the others once; all draw 70 batches of 48
replies from the policy, Nash-MD and the gradient as many again from an opponent. ``table-score.png`` shows the oracle's
score over the KL, one curve for each.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import alignjax as aj

TAUS = (0.005, 0.02, 0.1)
SHARED = ("base", "rlcd_pairs", "truth", "rlcd_reward", "preference")


def get_config(small: bool = False) -> aj.Experiment:
    """Returns three optimisers at three temperatures."""
    study = aj.load_module(Path(__file__).with_name("sandbox.py")).get_config(small)
    ppo, nash_md, gradient = (study.stages[name] for name in ("rlcd", "nash_md", "gradient"))
    names, arms = {"base": "base"}, {}  # name in the table -> stage
    for number, tau in enumerate(TAUS, 1):
        loss = partial(aj.losses.regularized_policy_gradient, tau=tau)
        objectives = {
            "ppo": (ppo, replace(ppo.objective, tau=tau)),
            "nash_md": (nash_md, aj.PreferenceGradient(partial(aj.losses.nash_md, tau=tau))),
            "gradient": (gradient, replace(gradient.objective, loss=loss)),
        }
        for name, (arm, objective) in objectives.items():
            names[f"{name} {tau}"] = f"{name}_{number}"
            arms[f"{name}_{number}"] = replace(arm, objective=objective)
    stages = {name: study.stages[name] for name in SHARED} | arms
    return replace(study, stages={**stages, "table": replace(study.stages["table"], policies=names)})
