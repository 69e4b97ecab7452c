"""The straight line on two cores: pretrain, label, fit, optimise, compare, in a world whose truth is known.

    alignjax run experiments/quickstart.py --workdir runs/quickstart
"""

from dataclasses import replace
from functools import partial

from alignjax import labeling, objectives, preference, rollout
from alignjax.models.transformer import TransformerConfig
from alignjax.stages import Adam, Experiment, FitPreference, Label, Loop, Optimise, Pretrain, Tournament, Writing
from alignjax.tasks import sandbox

BUCKETS = (32, 96)  # prompt lengths in tokens: one turn, two turns


def get_config() -> Experiment:
    writing = Writing(max_new_tokens=56, buckets=(36, 128), batch=128)
    fit = FitPreference(
        start="base",
        pairs="pairs",
        truth="truth",
        adam=Adam(lr=1e-3),
        loop=Loop(steps=80, batch=32),
        buckets=BUCKETS,
        response=56,
    )
    nash_md = Optimise(
        start="base",
        reference="base",
        preference="preference",
        objective=partial(objectives.nash_md, tau=0.02),
        opponent=partial(rollout.mixture, beta=0.25),
        adam=Adam(lr=1e-3, warmup=5),
        loop=Loop(steps=60, batch=64),
        prompts=4000,
        buckets=BUCKETS,
        max_new_tokens=56,
    )
    return Experiment(
        task=sandbox.task(),
        stages={
            "base": Pretrain(
                model=TransformerConfig(
                    vocab_size=640, width=192, layers=2, heads=6, kv_heads=3, head_dim=32, hidden=512
                ),
                documents=24_000,
                row=128,
                adam=Adam(lr=3e-3, warmup=50, weight_decay=0.01),
                loop=Loop(steps=600, batch=12),
            ),
            "pairs": Label(generator="base", method=labeling.rlcd, split="train", prompts=1280, writing=writing),
            "annotated": Label(
                generator="base",
                method=partial(labeling.by_oracle, oracle="oracle", error=0.1),
                split="train",
                prompts=1280,
                writing=writing,
            ),
            "truth": Label(
                generator="base",
                method=partial(labeling.by_oracle, oracle="oracle", error=0.0),
                split="validation",
                prompts=512,
                writing=writing,
            ),
            "preference": fit,
            "judge": replace(fit, pairs="annotated", form=preference.bradley_terry),
            "nash_md": nash_md,
            "self_play": replace(nash_md, opponent=rollout.self_play),
            "table": Tournament(
                policies={"base": "base", "nash_md": "nash_md", "self_play": "self_play"},
                reference="base",
                judges={"oracle": "oracle:oracle", "held-out": "judge"},
                prompts=1000,
                writing=replace(writing, buckets=BUCKETS),
            ),
        },
    )
