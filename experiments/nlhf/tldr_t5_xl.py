"""Table 1 of Nash learning from human feedback (2312.00886) at its size: TL;DR, T5-L policies, a T5-XL to compare.

    alignjax run experiments/nlhf/tldr_t5_xl.py --workdir runs/tldr --set policy=PATH/t5-large-sft \\
        --set reader=PATH/t5-v1_1-xl --set rater=PATH/flan-t5-xxl \\
        --set train=PATH/train.jsonl --set test=PATH/test.jsonl \\
        --set comparisons=PATH/comparisons-train.jsonl --set held_out=PATH/comparisons-test.jsonl
    ... --only md3                                                   # an arm as a job of its own
    alignjax plan experiments/nlhf/tldr_t5_xl.py --topology v5e:4x4  # needs no checkpoint and no data

To fetch, with a network, as safetensors: google/t5-v1_1-xl and google/flan-t5-xxl; a T5 v1.1 Large that was
fine-tuned on the summaries of the training posts, prompts written as ``summary.ENCODER_DECODER`` says (there is no
stage for that fine-tuning here yet); the filtered TL;DR posts and the comparisons of openai/summarize-from-feedback
(2009.01325), the files of one kind joined. A folder of another size than T5_LARGE, T5_XL or T5_XXL is refused by
name.

From the paper: data, sizes, the fine-tuned policy as start and reference of every arm, 10,000 steps, tau .008 (of the
reward's policy gradient, RLHF: .05), the betas, the decays of the moving averages (from memory), 2000 comparisons a
cell, the preference model's question with its answers 1 and 2.

Ours, where the paper does not say: Adam at a constant 3e-5 and batches of 32, which are 2403.08635's for the same
algorithm, but for its Adafactor; posts of at most 512 tokens and summaries of at most 64, temperature 1; the
preference models' rate and one epoch; the arms with averaged weights as result (EMA1*, EMA2*) are left out; the
judge, in the paper a larger language model, is Flan-T5-XXL, asked as it is in both orders. Batches of 32 divide over
16 devices; with more of them, --set mesh.tensor=4.
"""

from dataclasses import replace
from functools import partial

from alignjax import objectives
from alignjax.distributed.sharding import Mesh
from alignjax.models.t5 import T5Config
from alignjax.pipeline.stages import (
    Adam,
    Experiment,
    FitPreference,
    GivenPairs,
    Loop,
    Optimise,
    Pretrained,
    Tournament,
    Writing,
    ZeroShot,
)
from alignjax.preferences import models as preference
from alignjax.sampling import samplers as rollout
from alignjax.tasks import summary

T5_LARGE = T5Config(  # T5 v1.1 (2002.05202; sizes of 1910.10683, gated)
    vocab_size=32_128, width=1024, layers=24, decoder_layers=24, heads=16, head_dim=64, hidden=2816,
    activation="gelu_tanh", gated=True, tied=False, scaled_output=False,
)  # fmt: skip
T5_XL = replace(T5_LARGE, width=2048, heads=32, hidden=5120)
T5_XXL = replace(T5_LARGE, width=4096, heads=64, hidden=10_240)
POSTS = (128, 256, 512)  # prompt lengths in tokens
NEW_TOKENS = 64
EVERY = 200_000  # more posts than there are: all of them


def get_config(
    policy: str = "checkpoints/t5-large-sft",
    reader: str = "checkpoints/t5-v1_1-xl",
    rater: str = "checkpoints/flan-t5-xxl",
    train: str = "",
    test: str = "",
    comparisons: str = "",
    held_out: str = "",
) -> Experiment:
    sft = Pretrained(policy, compute_dtype="bfloat16", remat="full", model=T5_LARGE)
    fit = FitPreference(
        start="reader",
        pairs="pairs",
        truth="truth",
        adam=Adam(lr=1e-4, warmup=100, b2=0.999),
        loop=Loop(steps=2900, batch=32),  # an epoch of 92,820 comparisons
        buckets=POSTS,
        response=NEW_TOKENS + 32,  # of a comparison's summaries; a policy's are shorter
    )
    md = Optimise(
        start="sft",
        reference="sft",
        preference="preference",
        objective=partial(objectives.nash_md, tau=0.008),
        opponent=partial(rollout.mixture, beta=0.125),
        adam=Adam(lr=3e-5, warmup=0, schedule="constant", b2=0.999),
        loop=Loop(steps=10_000, batch=32, save_every=500),
        prompts=EVERY,
        buckets=POSTS,
        max_new_tokens=NEW_TOKENS,
    )
    arms = {
        "rlhf": replace(
            md,
            preference="reward",
            objective=partial(objectives.policy_gradient, tau=0.05, bound=5.0),
            opponent=rollout.self_play,
        ),
        "sp": replace(md, opponent=rollout.self_play),
        **{f"md{i}": replace(md, opponent=partial(rollout.mixture, beta=i / 8)) for i in range(1, 7)},
        "br": replace(md, opponent=rollout.best_response),
        **{
            f"ema{i}": replace(md, opponent=rollout.moving_average, average_decay=decay)
            for i, decay in ((1, 0.999), (2, 0.9995))
        },
    }
    return Experiment(
        task=summary.task(train, test=test),
        mesh=Mesh(data=1, fsdp=-1, tensor=1),
        stages={
            "sft": sft,
            "reader": replace(sft, path=reader, model=T5_XL),
            "rater": replace(sft, path=rater, model=T5_XXL, dtype="bfloat16"),
            "pairs": GivenPairs(comparisons, partial(summary.comparison, ask=summary.ENCODER_DECODER)),
            "truth": GivenPairs(held_out, partial(summary.comparison, ask=summary.ENCODER_DECODER)),
            "preference": fit,
            "reward": replace(fit, form=preference.bradley_terry),
            "judge": ZeroShot("rater"),
            **arms,
            "table": Tournament(
                policies={name: name for name in ("sft", *arms)},
                reference="sft",
                judges={"rater": "judge"},
                prompts=2000,
                writing=Writing(max_new_tokens=NEW_TOKENS, buckets=POSTS, batch=128),
            ),
        },
    )
