"""Table 1 of Nash learning from human feedback (2312.00886) in a small world: fourteen policies and one matrix.

    alignjax run experiments/nlhf/fourteen_policies.py --workdir runs/fourteen   # 35 minutes on two busy cores
    alignjax run experiments/nlhf/fourteen_policies.py --workdir runs/small --set small=True
    ... --only md3                                                                 # an arm as a job of its own

Policies summarise posts of ``alignjax.tasks.post_world``, whose annotators' majority is a cycle. ``sft`` is the start
and the reference of all. ``rlhf`` is the policy gradient on a reward model. The others learn from a preference model
fitted to the same pairs: ``sp`` is self-play, ``md1`` to ``md6`` Nash-MD with beta = 1/8 to 6/8, ``br`` the best
response to ``sft``, ``ema1`` and ``ema2`` Nash-EMA, ``ema1_avg`` and ``ema2_avg`` their averaged weights. All arms
share their prompts and random numbers.

``table``: the annotators judge (P*), and ``held_out``, a preference model fitted to other pairs. ``game`` rates the
pool. ``exploited``: what a best response wins that is trained against a policy. ``hacking``: ``br`` and ``md1`` over
their training, by the preference model that they are trained against and by the annotators.

The decays of the averages are the paper's in units of the training, which has 10,000 steps there. tau is 2.5 times the
paper's for Nash-MD, and the same for ``rlhf``, whose reward is in nats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

import alignjax as aj
from alignjax.preferences.statistics import mean_interval
from alignjax.reporting.tables import markdown_table
from alignjax.tasks import post_world
from alignjax.tasks.summary import PLAIN_QUERY

POST, SUMMARY = 40, 16  # tokens
TAU = 0.02
STEPS, BATCH, EVERY = 120, 48, 24
DECAYS = (1 - 10 / STEPS, 1 - 5 / STEPS)  # .999 and .9995 of 10,000 steps
EXPLOITED = ("sft", "rlhf", "sp", "md1", "br", "ema1")


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the study; ``small`` is a short form of it."""
    world, steps = post_world.PostWorld(facts=2, sloppy=0.4, query=PLAIN_QUERY), 6 if small else STEPS
    every = steps // 3 if small else EVERY
    writing = aj.Writing(max_new_tokens=SUMMARY, buckets=(POST,), batch=128)
    base = aj.Pretrain(
        model=aj.TransformerConfig(vocab_size=512, width=96, layers=2, heads=4, kv_heads=4, head_dim=24, hidden=288),
        documents=4000,
        row=96,
        adam=aj.Adam(lr=2e-3, warmup=5, weight_decay=0.01),
        loop=aj.Loop(steps=20, batch=12),
    )
    sft = aj.FineTune(
        start="base",
        pairs="summaries",
        adam=aj.Adam(lr=2e-3, warmup=50, weight_decay=0.01),
        loop=aj.Loop(steps=1000, batch=16),
        row=96,
    )
    pairs = aj.Label(
        generator="sft", method=aj.Judged(aj.Oracle("annotators")), split="train", prompts=4000, writing=writing
    )
    preference = aj.FitPreference(
        start="sft",
        pairs="pairs",
        truth="truth",
        adam=aj.Adam(lr=1e-3),
        loop=aj.Loop(steps=400, batch=32),
        buckets=(POST,),
        response=SUMMARY,
    )
    nash_md = aj.TrainPolicy(
        start="sft",
        reference="sft",
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=TAU)),
        data=aj.OnlineData(preference="preference", samplers=(aj.policy, aj.mixture(beta=1 / 8)), prompts=5000),
        adam=aj.Adam(lr=1e-4, warmup=5, b1=0.0, schedule="constant"),
        loop=aj.Loop(steps=steps, batch=BATCH),
        buckets=(POST,),
        max_new_tokens=SUMMARY,
    )
    prompts = 1000
    if small:
        base = replace(base, loop=aj.Loop(steps=20, batch=8))
        sft = replace(sft, loop=aj.Loop(steps=60, batch=16))
        writing = replace(writing, batch=16)
        pairs = replace(pairs, prompts=96, writing=writing)
        preference = replace(preference, loop=aj.Loop(steps=6, batch=16))
        nash_md = replace(nash_md, loop=aj.Loop(steps=steps, batch=16), data=replace(nash_md.data, prompts=96))
        prompts = 32

    def against(opponent: aj.Sampler) -> aj.TrainPolicy:
        """Returns the arm whose second response the opponent writes."""
        return replace(nash_md, data=replace(nash_md.data, samplers=(aj.policy, opponent)))

    arms = {
        "rlhf": replace(
            nash_md,
            objective=aj.RewardGradient(partial(aj.losses.regularized_policy_gradient, tau=TAU), bound=5.0),
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
    exploiters = {f"against_{name}": exploiter(nash_md, name, steps // 3) for name in EXPLOITED}
    table = aj.Tournament(
        policies={name: name for name in policies},
        reference="sft",
        judges={"annotators": aj.Oracle("annotators"), "held_out": aj.ModelJudge("judge")},
        prompts=prompts,
        writing=writing,
        tau=TAU,
    )
    answered = {name: name for name in EXPLOITED} | {f"against {name}": f"against_{name}" for name in EXPLOITED}
    return aj.Experiment(
        task=post_world.post_task(world),
        stages={
            "base": base,
            "summaries": aj.TaskReplies(1000 if small else 16_000),
            "sft": sft,
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
                function=partial(exploitation, masses=world.masses),
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


def exploiter(nash_md: aj.TrainPolicy, policy: str, steps: int) -> aj.TrainPolicy:
    """Returns the training of a best response to a policy, which it begins as; no KL holds it back."""
    return replace(
        nash_md,
        start=policy,
        reference=policy,  # the opponent
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.0)),
        data=replace(nash_md.data, samplers=(aj.policy, aj.reference)),
        loop=replace(nash_md.loop, steps=steps),
    )


def exploitation(prompts: Sequence[str], replies: Mapping[str, Sequence[str]], masses: Sequence[float]) -> aj.Finding:
    """Returns what the annotators say of a policy and of the best response that was trained against it."""
    rows, numbers = [], {}
    for name in EXPLOITED:
        pairs = zip(prompts, replies[f"against {name}"], replies[name], strict=True)
        p = np.array([post_world.annotators_prefer(masses, *pair) for pair in pairs])
        low, high = mean_interval(p, (0, 1))
        numbers[name] = {"mean_probability": float(p.mean()), "low": low, "high": high, "n": len(p)}
        rows.append([name, f"{p.mean():.3f} [{low:.3f}, {high:.3f}]"])
    text = markdown_table(["policy", "P(its best response > policy)"], rows)
    note = "The best response begins as the policy and learns from the preference model. The annotators judge.\n"
    return aj.Finding(f"## What a trained best response wins\n\n{text}\n{note}", {}, numbers)
