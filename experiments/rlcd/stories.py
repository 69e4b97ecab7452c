"""RLCD's arms (2307.12950) on a real checkpoint and real text: stories about a girl, or happy ones.

    alignjax run experiments/rlcd/stories.py --workdir runs/girl \\
        --set checkpoint=PATH/stories260K --set openings=PATH/story_premises.jsonl [--set principle=happy]

The files and principles are those of ``experiments/stories.py``. A model of this size understands no question, so that
RLAIF and Rescore have labels by chance: they show what RLCD does not need. The oracle judges.

With stories260K, girl: RLCD's labels were right in .960 of the pairs, RLAIF's in .526; PPO on them beat the base with
.937 [.914, .955] and .491 [.450, .532] (README has the table). Happy: .681 and .516 of the labels were right, and no
reward model learned them; PPO on RLCD's beat the base with .458 [.417, .499], distillation with .543 [.502, .584].
"""

from dataclasses import replace

import alignjax as aj
from alignjax.tasks import stories

NEW_TOKENS = 60
BUCKETS = (32, 48, 80)  # opening lengths in tokens
ARMS = ("rlcd", "rlaif", "rescore")


def get_config(checkpoint: str, openings: str, principle: str = "girl") -> aj.Experiment:
    """Returns all arms; ``principle`` is girl or happy."""
    writing = aj.Writing(max_new_tokens=NEW_TOKENS, buckets=(64, 128), batch=128)
    sizes, rater = aj.JudgeSizes(batch=128, prompt=max(BUCKETS), reply=NEW_TOKENS), aj.LanguageModelRater("base")
    pairs = aj.Label(generator="base", method=aj.RLCD(), split="train", prompts=1024, writing=writing)
    truth = replace(pairs, method=aj.Judged(aj.Oracle("oracle")), split="validation", prompts=256)
    reward = aj.FitPreference(
        start="base",
        pairs="rlcd_pairs",
        truth="truth",
        form=aj.bradley_terry,
        adam=aj.Adam(lr=1e-3),
        loop=aj.Loop(steps=100, batch=16),
        buckets=BUCKETS,
        response=NEW_TOKENS,
    )
    ppo = aj.TrainPolicy(
        start="base",
        reference="base",
        objective=aj.PPO(tau=0.05, invalid=None),  # most continuations are cut before their story ends
        critic=aj.Critic("rlcd_reward"),
        data=aj.OnlineData(
            preference="rlcd_reward", samplers=(aj.policy,), prompts=2048, response=NEW_TOKENS, unfinished_loses=False
        ),
        adam=aj.Adam(lr=5e-4, warmup=5),
        loop=aj.Loop(steps=50, batch=32, epochs=2, minibatches=2),
        buckets=BUCKETS,
        max_new_tokens=NEW_TOKENS,
    )
    distilled = aj.FineTune(
        start="base", pairs="rlcd_pairs", adam=aj.Adam(lr=5e-4), loop=aj.Loop(steps=100, batch=16), row=160
    )
    return aj.Experiment(
        task=stories.stories_task(openings, principle),
        stages={
            "base": aj.LoadCheckpoint(checkpoint),
            "rlcd_pairs": pairs,
            "rlaif_pairs": replace(pairs, method=aj.RLAIF(rater)),
            "rescore_pairs": aj.Relabel(pairs="rlcd_pairs", judge=rater, sizes=sizes),
            "truth": truth,
            "labels": aj.PairStudy(pairs={arm: f"{arm}_pairs" for arm in ARMS}, judge=aj.Oracle("oracle"), sizes=sizes),
            **{f"{arm}_reward": replace(reward, pairs=f"{arm}_pairs") for arm in ARMS},
            **{
                arm: replace(ppo, critic=aj.Critic(f"{arm}_reward"), data=replace(ppo.data, preference=f"{arm}_reward"))
                for arm in ARMS
            },
            "distilled": distilled,
            "table": aj.Tournament(
                policies={name: name for name in ("base", "distilled", *ARMS[1:], "rlcd")},
                reference="base",
                judges={"oracle": aj.Oracle("oracle")},
                prompts=600,
                writing=writing,
            ),
        },
    )
