"""The sweeps of tau of Nash learning from human feedback (2312.00886): RLHF's and Nash-MD's, in the small world.

    alignjax run experiments/nlhf/taus.py --workdir runs/taus
    alignjax run experiments/nlhf/taus.py --workdir runs/small --set small=True

The arms are ``rlhf`` and ``md1`` of ``fourteen_policies.py``, at each tau that the paper tried. It chose .05 for RLHF
and .008 for Nash-MD.
``table-judges.png`` shows P(policy > ``sft``) against the KL, one curve for each arm and judge.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import alignjax as aj
from alignjax.pipeline.experiment import ancestors, order

RLHF, NASH_MD = (0.01, 0.02, 0.05, 0.1, 0.2), (0.005, 0.008, 0.01, 0.02)


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the arms of two algorithms at several temperatures."""
    study = aj.load_module(Path(__file__).with_name("fourteen_policies.py")).get_config(small)
    rlhf, md1, table = (study.stages[name] for name in ("rlhf", "md1", "table"))
    names, arms = {"sft": "sft"}, {}  # name in the table -> stage
    for i, tau in enumerate(RLHF, 1):
        loss = partial(aj.losses.regularized_policy_gradient, tau=tau)
        names[f"rlhf {tau}"], arms[f"rlhf_{i}"] = (
            f"rlhf_{i}",
            replace(rlhf, objective=replace(rlhf.objective, loss=loss)),
        )
    for i, tau in enumerate(NASH_MD, 1):
        loss = partial(aj.losses.nash_md, tau=tau)
        names[f"md1 {tau}"], arms[f"md1_{i}"] = (
            f"md1_{i}",
            replace(md1, objective=aj.PreferenceGradient(loss), keep_at=()),
        )
    stages = {**study.stages, **arms, "table": replace(table, policies=names, tau=None)}
    kept = ancestors(stages, ["table"])
    return replace(study, stages={name: stages[name] for name in order(stages) if name in kept})
