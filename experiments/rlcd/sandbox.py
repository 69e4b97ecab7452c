"""RLCD against its rivals (2307.12950), in the small world whose truth is known: labels, policies, win rates.

    alignjax run experiments/rlcd/sandbox.py --workdir runs/rlcd                   # 10 minutes on two cores
    alignjax run experiments/rlcd/sandbox.py --workdir runs/rlcd1 --set seed=1     # another seed
    alignjax run experiments/rlcd/sandbox.py --workdir runs/small --set small=True

One base model simulates and is trained. ``rlcd``: the prompt labels the pair. ``rlaif``: the base itself, asked a
question, labels two replies to the plain prompt, in one order as in the paper. ``rescore``: it labels RLCD's replies.
Each fits a reward model, against which PPO optimises the policy. ``distilled`` is fine-tuned on the replies under
positive prompts.
``nash_md`` and ``gradient`` take RLCD's labels too: they and PPO draw the same number of replies. The oracle judges.

Seeds 0, 1 and 2: RLCD's labels were right in .927, .920 and .914 of the pairs, RLAIF's in .825, .531 and .617. PPO on
RLCD's labels beat the base with .879, .848 and .844, context distillation with .715, .667 and .672, and RLAIF's policy
with .507, .714 and .782 (README has the intervals).

The defaults are the setting of appendix N: latent means 3 apart, and a rater who is right in 3 of 4 pairs.
"""

from dataclasses import replace
from functools import partial

import alignjax as aj
from alignjax.tasks import sandbox

ONE_TURN, TWO_TURNS = 24, 80  # prompt lengths in tokens
REPLY = 28  # tokens
STEPS, BATCH = 70, 48


def get_config(small: bool = False, gap: float = 3.0, rater_error: float = 0.25) -> aj.Experiment:
    """Returns the study. ``gap`` is the distance of the latent means under a positive and a negative prompt;
    ``rater_error`` is how often raters are wrong in the corpus that the base learns from."""
    writing = aj.Writing(max_new_tokens=REPLY, buckets=(32, 104), batch=128)
    sizes = aj.JudgeSizes(batch=128, prompt=TWO_TURNS, reply=REPLY)
    base = aj.Pretrain(
        model=aj.TransformerConfig(vocab_size=704, width=192, layers=2, heads=6, kv_heads=3, head_dim=32, hidden=512),
        documents=10_000,
        row=96,
        adam=aj.Adam(lr=3e-3, warmup=50, weight_decay=0.01),
        loop=aj.Loop(steps=560, batch=12),
    )
    rlcd = aj.Label(generator="base", method=aj.RLCD(), split="train", prompts=1280, writing=writing)
    reward = aj.FitPreference(
        start="base",
        pairs="rlcd_pairs",
        truth="truth",
        form=aj.bradley_terry,
        adam=aj.Adam(lr=5e-4),
        loop=aj.Loop(steps=80, batch=32),
        buckets=(ONE_TURN, TWO_TURNS),
        response=REPLY,
    )
    ppo = aj.TrainPolicy(
        start="base",
        reference="base",
        objective=aj.PPO(tau=0.02),
        critic=aj.Critic("rlcd_reward"),
        data=aj.OnlineData(preference="rlcd_reward", samplers=(aj.policy,), prompts=4000),
        adam=aj.Adam(lr=3e-4, warmup=5),
        loop=aj.Loop(steps=STEPS, batch=BATCH, epochs=2, minibatches=2),
        buckets=(ONE_TURN,),  # longer prompts are left out: one compilation, and what is learnt carries over
        max_new_tokens=REPLY,
    )
    nash_md = replace(
        ppo,
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.02)),
        critic=None,
        data=replace(ppo.data, preference="preference", samplers=(aj.policy, aj.mixture(beta=0.25))),
        adam=aj.Adam(lr=5e-4, warmup=5),
        loop=aj.Loop(steps=STEPS, batch=BATCH),
    )
    distilled = aj.FineTune(
        start="base",
        pairs="rlcd_pairs",
        adam=aj.Adam(lr=3e-4, warmup=10),
        loop=aj.Loop(steps=100, batch=12),
        row=144,
    )
    policies = ("base", "distilled", "rlaif", "rescore", "rlcd", "nash_md", "gradient")
    table = aj.Tournament(
        policies={name: name for name in policies},
        reference="base",
        judges={"oracle": aj.Oracle("oracle")},
        prompts=600,
        writing=replace(writing, buckets=(ONE_TURN, TWO_TURNS)),
    )
    world, truth_prompts = sandbox.World(mean_gap=gap, rater_error=rater_error), 512
    if small:
        world = sandbox.World(nouns=8, verbs=6, two_turns=0.0, mean_gap=gap, rater_error=rater_error)
        base = replace(
            base,
            model=replace(base.model, vocab_size=576, width=96, layers=2, heads=4, kv_heads=2, head_dim=24, hidden=192),
            documents=4000,
            adam=aj.Adam(lr=5e-3, warmup=20),
            loop=aj.Loop(steps=150, batch=8),
        )
        writing, sizes = replace(writing, batch=16), sizes._replace(batch=16)
        rlcd, truth_prompts = replace(rlcd, prompts=128, writing=writing), 128
        reward = replace(reward, loop=aj.Loop(steps=20, batch=16))
        ppo = replace(ppo, loop=replace(ppo.loop, steps=10, batch=16), data=replace(ppo.data, prompts=64))
        nash_md = replace(nash_md, loop=aj.Loop(steps=10, batch=16), data=replace(nash_md.data, prompts=64))
        distilled = replace(distilled, loop=aj.Loop(steps=10, batch=8))
        table = replace(table, prompts=24, writing=replace(table.writing, batch=16))
    rater = aj.LanguageModelRater("base")

    def arm(name: str) -> aj.TrainPolicy:
        """Returns PPO against the reward model of another way to label."""
        return replace(ppo, critic=aj.Critic(f"{name}_reward"), data=replace(ppo.data, preference=f"{name}_reward"))

    return aj.Experiment(
        task=sandbox.sandbox_task(world),
        stages={
            "base": base,
            "rlcd_pairs": rlcd,
            "rlaif_pairs": replace(rlcd, method=aj.RLAIF(rater)),
            "rescore_pairs": aj.Relabel(pairs="rlcd_pairs", judge=rater, sizes=sizes),
            "truth": replace(rlcd, method=aj.Judged(aj.Oracle("oracle")), split="validation", prompts=truth_prompts),
            "labels": aj.PairStudy(
                pairs={"RLCD": "rlcd_pairs", "RLAIF": "rlaif_pairs", "Rescore": "rescore_pairs"},
                judge=aj.Oracle("oracle"),
                sizes=sizes,
            ),
            "agreement": aj.MeasureAgreement(
                models={"RLCD": "rlcd_reward", "RLAIF": "rlaif_reward", "Rescore": "rescore_reward"},
                pairs="truth",
                sizes=sizes,
            ),
            "rlcd_reward": reward,
            "rlaif_reward": replace(reward, pairs="rlaif_pairs"),
            "rescore_reward": replace(reward, pairs="rescore_pairs"),
            "preference": replace(reward, form=aj.pairwise),
            "distilled": distilled,
            "rlcd": ppo,
            "rlaif": arm("rlaif"),
            "rescore": arm("rescore"),
            "nash_md": nash_md,
            "gradient": replace(
                nash_md,
                objective=aj.RewardGradient(partial(aj.losses.regularized_policy_gradient, tau=0.02), bound=5.0),
                data=replace(nash_md.data, preference="rlcd_reward", samplers=(aj.policy, aj.policy)),
            ),
            "table": table,
        },
    )
