"""Table 1 of Nash learning from human feedback (2312.00886) in a small world: fourteen policies and one matrix.

    alignjax run experiments/nlhf/fourteen_policies.py --workdir runs/fourteen   # 35 minutes on two busy cores
    alignjax run experiments/nlhf/fourteen_policies.py --workdir runs/small --set small=True   # learns nothing
    ... --only md3                                                                 # an arm as a job of its own

Policies summarise posts of ``alignjax.tasks.post_world``, whose annotators' majority is a cycle. ``sft`` is the start
and the reference of all. ``rlhf`` is the policy gradient on a reward model. The others learn from a preference model
fitted to the same pairs: ``sp`` is self-play, ``md1`` to ``md6`` Nash-MD with beta = 1/8 to 6/8, ``br`` the best
response to ``sft``, ``ema1`` and ``ema2`` Nash-EMA, ``ema1_avg`` and ``ema2_avg`` their averaged weights. All arms
share their prompts and random numbers.

The stages up to the two models are those of ``why_nash.py``, with more pairs, longer fits, and writers of whom three in
ten tell a fact twice. No annotator likes that, so every arm can beat ``sft``.

``table``: the annotators judge (P*), and ``held_out``, a preference model fitted to other pairs. ``game`` rates the
pool. ``exploited``: what the best single style wins against a policy, and what a best response does that is trained
against it for as many steps. ``hacking``: ``br`` and ``md1`` over their training, by the preference model that they are
trained against and by the annotators.

A moving average reaches back over the same share of the training as in the paper, where that has 10,000 steps. tau is
that of ``why_nash.py`` for all arms, RLHF's too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import alignjax as aj
from alignjax.preferences.statistics import mean_interval
from alignjax.reporting.tables import markdown_table
from alignjax.tasks import post_world

SUMMARY = 16  # tokens
STEPS, EVERY = 175, 35  # of training, and between the points of a curve
DECAYS = (1 - 10 / STEPS, 1 - 5 / STEPS)  # .999 and .9995 of 10,000 steps
EXPLOITED = ("sft", "rlhf", "sp", "md1", "br", "ema1")
ReadPoint = Callable[[Sequence[float], str, Sequence[str], Sequence[str]], Any]  # why_nash.read_point


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the study; ``small`` is a short form of it."""
    why = aj.load_module(Path(__file__).with_name("why_nash.py"))
    stages = why.get_config(small).stages
    world = replace(why.WORLD, sloppy=0.3)
    steps, every, prompts = (6, 2, 32) if small else (STEPS, EVERY, 1000)
    sft, pairs, preference, nash_md = (stages[name] for name in ("sft", "pairs", "preference", "nash_md_0"))
    writing = replace(pairs.writing, max_new_tokens=SUMMARY)
    pairs = replace(pairs, prompts=96 if small else 6000, writing=writing)
    preference = replace(preference, loop=replace(preference.loop, steps=6 if small else 600), response=SUMMARY)
    nash_md = replace(
        nash_md,
        data=replace(nash_md.data, samplers=(aj.policy, aj.mixture(beta=1 / 8))),
        loop=replace(nash_md.loop, steps=steps),
        max_new_tokens=SUMMARY,
        keep_at=(),
    )

    def against(opponent: aj.Sampler) -> aj.TrainPolicy:
        """Returns the arm whose second response the opponent writes."""
        return replace(nash_md, data=replace(nash_md.data, samplers=(aj.policy, opponent)))

    arms = {
        "rlhf": replace(
            nash_md,
            objective=stages["rlhf_0"].objective,
            data=replace(nash_md.data, preference="reward", samplers=(aj.policy, aj.policy)),
        ),
        "sp": against(aj.policy),
        **{f"md{i}": against(aj.mixture(beta=i / 8)) for i in range(1, 7)},
        "br": against(aj.reference),
        **{f"ema{i}": replace(against(aj.moving_average), average_decay=d) for i, d in enumerate(DECAYS, 1)},
    }
    followed = tuple(range(every, steps + 1, every))  # steps
    arms |= {name: replace(arms[name], keep_at=followed) for name in ("br", "md1")}
    averages = {f"ema{i}_avg": aj.KeptPolicy(policy=f"ema{i}", at="average") for i in (1, 2)}
    policies = ("sft", *arms, *averages)
    courses = {f"{arm}_{step}": aj.KeptPolicy(policy=arm, at=step) for arm in ("br", "md1") for step in followed}
    exploiters = {f"against_{name}": exploiter(nash_md, name) for name in EXPLOITED}
    table = aj.Tournament(
        policies={name: name for name in policies},
        reference="sft",
        judges={"annotators": aj.Oracle("annotators"), "held_out": aj.ModelJudge("judge")},
        prompts=prompts,
        writing=writing,
        tau=why.TAU,
    )
    answered = {name: name for name in EXPLOITED} | {f"against {name}": f"against_{name}" for name in EXPLOITED}
    return aj.Experiment(
        task=post_world.post_task(world),
        stages={
            "base": stages["base"],
            "summaries": aj.TaskReplies(1000 if small else 16_000),
            "sft": sft if small else replace(sft, loop=replace(sft.loop, steps=1000)),
            "pairs": pairs,
            "truth": replace(pairs, split="validation", prompts=prompts),
            "judge_pairs": replace(pairs, seed=1),
            "preference": preference,
            "reward": replace(preference, form=aj.bradley_terry),
            "judge": replace(preference, pairs="judge_pairs", seed=1),
            **arms,
            **averages,
            "table": table,
            "game": aj.RatePool(table="table"),
            **exploiters,
            "exploited": aj.ReplyStudy(
                policies=answered,
                function=partial(exploitation, masses=post_world.MASSES, read_point=why.read_point),
                prompts=prompts,
                writing=writing,
            ),
            **courses,
            "hacking": replace(
                table,
                policies={"sft": "sft", **{name.replace("_", " "): name for name in courses}},
                judges={
                    "annotators": aj.Oracle("annotators"),
                    "training": aj.TrainingJudge(aj.ModelJudge("preference")),
                },
                tau=None,
            ),
        },
    )


def exploiter(nash_md: aj.TrainPolicy, policy: str) -> aj.TrainPolicy:
    """Returns the training of a best response to a policy, which it begins as; no KL holds it back."""
    return replace(
        nash_md,
        start=policy,
        reference=policy,  # the opponent
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.0)),
        data=replace(nash_md.data, samplers=(aj.policy, aj.reference)),
    )


def exploitation(
    prompts: Sequence[str], replies: Mapping[str, Sequence[str]], masses: Sequence[float], read_point: ReadPoint
) -> aj.Finding:
    """Returns the styles of the policies, and what one style and a response trained to beat them win against them."""
    rows, numbers = [], {}
    for name in EXPLOITED:
        point = read_point(masses, f"{name} 0 0", prompts, replies[name])
        pairs = zip(prompts, replies[f"against {name}"], replies[name], strict=True)
        wins = np.array([post_world.annotators_prefer(masses, *pair) for pair in pairs])
        bounds = mean_interval(wins, (0, 1))
        best, trained = 0.5 + point.exploitability, float(wins.mean())
        best_bounds = [0.5 + end for end in point.interval]
        shares = [f"{share:.3f}" for share in point.shares]
        rows.append([name, *shares, _interval(best, best_bounds), _interval(trained, bounds)])
        numbers[name] = {
            "n": len(prompts),
            "shares": dict(zip(post_world.STYLES, point.shares, strict=True)),
            "best_style": {"mean_probability": best, "low": best_bounds[0], "high": best_bounds[1]},
            "trained": {"mean_probability": trained, "low": bounds[0], "high": bounds[1]},
        }
    header = ["policy", *post_world.STYLES, "P(best style > policy)", "P(trained response > policy)"]
    note = (
        "The best style: every summary is bold, or every one careful, or terse, whichever wins most here. The trained\n"
        "response begins as the policy and learns from the preference model to beat it. The annotators judge.\n"
    )
    return aj.Finding(f"## How far a policy can be exploited\n\n{markdown_table(header, rows)}\n{note}", {}, numbers)


def _interval(value: float, bounds: Sequence[float]) -> str:
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
