"""Further objectives beside Nash-MD (2312.00886), on one set of pairs, prompts and random numbers, in the small world.

    alignjax run experiments/nlhf/objectives.py --workdir runs/objectives
    alignjax run experiments/nlhf/objectives.py --workdir runs/small --set small=True

The arms are online IPO and IPO-MD (2403.08635), online DPO (2402.04792), XPO (2405.21046), INPO (2407.00617), SPPO
(2405.00675) and EGPO (2503.08942). All stages before them are those of ``fourteen_policies.py``. ``inpo`` and ``sppo``
draw four responses to a prompt, ``egpo`` three, the others two. tau and beta are those of ``why_nash.py``.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import alignjax as aj
from alignjax.pipeline.experiment import ancestors, order

SHOWN = ("sft", "rlhf", "md1")  # of the fourteen


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the arms."""
    study = aj.load_module(Path(__file__).with_name("fourteen_policies.py")).get_config(small)
    why = aj.load_module(Path(__file__).with_name("why_nash.py"))
    md1 = study.stages["md1"]

    def arm(objective: aj.DirectAlignment | aj.IterativeAlignment | aj.OpponentAlignment, *samplers: aj.Sampler):
        """Returns another objective on what these samplers write."""
        return replace(md1, objective=objective, data=replace(md1.data, samplers=samplers), keep_at=())

    online_ipo = aj.DirectAlignment(partial(aj.losses.online_ipo, tau=why.TAU))
    iterations = replace(md1.loop, epochs=2, minibatches=2)
    arms = {
        "online_ipo": arm(online_ipo, aj.policy, aj.policy),
        "ipo_md": arm(online_ipo, aj.mixture(why.BETA), aj.mixture(why.BETA)),
        "online_dpo": arm(aj.DirectAlignment(partial(aj.losses.dpo, beta=0.1)), aj.policy, aj.policy),
        "xpo": arm(
            aj.DirectAlignment(partial(aj.losses.xpo, beta=0.1, alpha=1e-3), of_reference=(1,)),
            aj.policy,
            aj.reference,
        ),
        "inpo": replace(
            arm(aj.IterativeAlignment(4, partial(aj.losses.inpo, tau=why.TAU, eta=0.1), True), *(aj.policy,) * 4),
            loop=iterations,
        ),
        "sppo": replace(
            arm(aj.IterativeAlignment(4, partial(aj.losses.sppo, eta=5.0), False), *(aj.policy,) * 4), loop=iterations
        ),
        "egpo": replace(
            arm(aj.OpponentAlignment(partial(aj.losses.opponent_ipo, tau=why.TAU)), *(aj.policy,) * 3),
            extragradient=True,
            loop=replace(md1.loop, steps=md1.loop.steps // 2 * 2),  # two batches are one extragradient step
        ),
    }
    stages = {**study.stages, **arms}
    stages["table"] = replace(stages["table"], policies={name: name for name in (*SHOWN, *arms)})
    kept = ancestors(stages, ["game"])
    return replace(study, stages={name: stages[name] for name in order(stages) if name in kept})
