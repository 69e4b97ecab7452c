"""Direct alignment beside Nash-MD: the quickstart with three more arms.

    alignjax run experiments/direct_alignment.py --workdir runs/direct [--set small=True]
    ... --set ipo_md.data.samplers.0.beta=0.5 --set ipo_md.data.samplers.1.beta=0.5    # another mixture

DPO (2305.18290) learns from the very pairs that the preference model is fitted to, and needs no preference model.
Online IPO and IPO-MD (2403.08635) share one loss. The policy writes online IPO's pairs; its mixture with the reference
writes IPO-MD's. With the tau and beta of the quickstart, online IPO has the stationary point of self-play, and IPO-MD
has that of Nash-MD.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import alignjax as aj

quickstart = aj.load_module(Path(__file__).with_name("quickstart.py"))


def get_config(small: bool = False, tau: float = 0.02, beta: float = 0.25) -> aj.Experiment:
    """Returns the quickstart with the arms dpo, online_ipo and ipo_md in its table."""
    config = quickstart.get_config(small)
    nash_md, table = config.stages["nash_md"], config.stages.pop("table")  # so that the table comes last
    online_ipo = replace(
        nash_md,
        objective=aj.DirectAlignment(partial(aj.losses.online_ipo, tau=tau)),
        data=replace(nash_md.data, samplers=(aj.policy, aj.policy)),
    )
    arms = {
        "dpo": replace(
            nash_md,
            objective=aj.DirectAlignment(partial(aj.losses.dpo, beta=0.1)),
            data=aj.OfflineData(pairs="pairs"),
        ),
        "online_ipo": online_ipo,
        "ipo_md": replace(online_ipo, data=replace(nash_md.data, samplers=(aj.mixture(beta), aj.mixture(beta)))),
    }
    return config.with_stages(**arms, table=replace(table, policies={**table.policies, **{n: n for n in arms}}))
