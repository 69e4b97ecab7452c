"""Table 1 of Nash learning from human feedback (2312.00886) at its size: TL;DR, T5-L policies, a T5-XL that compares.

    alignjax run experiments/nlhf/tldr_t5_xl.py --workdir runs/tldr --set policy=PATH/t5-large-sft \\
        --set reader=PATH/t5-v1_1-xl --set rater=PATH/flan-t5-xxl \\
        --set train=PATH/train.jsonl --set test=PATH/test.jsonl \\
        --set comparisons=PATH/comparisons-train.jsonl --set held_out=PATH/comparisons-test.jsonl
    ... --set policy=PATH/t5-v1_1-large --set replies=PATH/train.jsonl   # fine-tunes the policies' start itself
    ... --only md3                                                   # an arm as a job of its own
    alignjax plan experiments/nlhf/tldr_t5_xl.py --topology v5e:4x4  # needs no checkpoint and no data

To fetch, with a network, as safetensors: google/t5-v1_1-xl and google/flan-t5-xxl; a T5 v1.1 Large that was
fine-tuned on the summaries of the training posts, with prompts in the form of ``summary.T5_INSTRUCTION``, or
google/t5-v1_1-large and as ``replies`` the training posts with their authors' summaries; the filtered TL;DR posts and
the comparisons of openai/summarize-from-feedback (2009.01325), the files of one kind joined. A folder of another size
than T5_LARGE, T5_XL or T5_XXL is refused.

From the paper: data, sizes, the fine-tuned policy as start and reference of every arm, 10,000 steps, tau .008 (of the
reward's policy gradient, RLHF: .05), the betas, the decays of the moving averages (from memory), 2000 comparisons a
cell, the preference model's question with its answers 1 and 2.

Ours, where the paper does not say: Adam at a constant 3e-5 and batches of 32, as in 2403.08635 for the same algorithm
(which uses Adafactor); posts of at most 512 tokens and summaries of at most 64, temperature 1; the preference models'
rate and one epoch; the fine-tuning's rate, batch and one epoch. The arms whose result is an average of the weights
(EMA1*, EMA2*) are left out. The paper's judge is a larger language model; here it is Flan-T5-XXL, asked in both orders
without training. Batches of 32 divide over 16 devices; with more devices, --set mesh.tensor=4.
"""

from dataclasses import replace
from functools import partial

import alignjax as aj
from alignjax.tasks import summary

T5_LARGE = aj.T5Config(  # T5 v1.1 (2002.05202; sizes of 1910.10683, gated)
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
    replies: str = "",
) -> aj.Experiment:
    """Returns the arms of table 1; ``rater`` is the checkpoint that judges.

    ``policy`` is fine-tuned on the summaries of ``replies``; without a file it has been.
    """
    checkpoint = aj.LoadCheckpoint(policy, compute_dtype="bfloat16", remat="full", model=T5_LARGE)
    supervised = {
        "base": checkpoint,
        "replies": aj.LoadReplies(replies, summary.read_tldr_demonstration),
        "sft": aj.FineTune(
            start="base",
            pairs="replies",
            adam=aj.Adam(lr=1e-4, warmup=50, b2=0.999),
            loop=aj.Loop(steps=910, batch=128, accumulate=2),  # an epoch of 116,722 posts
            row=max(POSTS),
        ),
    }
    fit = aj.FitPreference(
        start="reader",
        pairs="pairs",
        truth="truth",
        adam=aj.Adam(lr=1e-4, warmup=100, b2=0.999),
        loop=aj.Loop(steps=2900, batch=32),  # an epoch of 92,820 comparisons
        buckets=POSTS,
        response=NEW_TOKENS + 32,  # of a comparison's summaries; a policy's are shorter
    )
    md = aj.TrainPolicy(
        start="sft",
        reference="sft",
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.008)),
        data=aj.OnlineData(preference="preference", samplers=(aj.policy, aj.mixture(beta=0.125)), prompts=EVERY),
        adam=aj.Adam(lr=3e-5, warmup=0, schedule="constant", b2=0.999),
        loop=aj.Loop(steps=10_000, batch=32, save_every=500),
        buckets=POSTS,
        max_new_tokens=NEW_TOKENS,
    )

    def against(opponent: aj.Sampler) -> aj.TrainPolicy:
        """Returns the arm whose second response the opponent writes."""
        return replace(md, data=replace(md.data, samplers=(aj.policy, opponent)))

    arms = {
        "rlhf": replace(
            md,
            objective=aj.RewardGradient(partial(aj.losses.regularized_policy_gradient, tau=0.05), bound=5.0),
            data=replace(md.data, preference="reward", samplers=(aj.policy, aj.policy)),
        ),
        "sp": against(aj.policy),
        **{f"md{i}": against(aj.mixture(beta=i / 8)) for i in range(1, 7)},
        "br": against(aj.reference),
        **{
            f"ema{i}": replace(against(aj.moving_average), average_decay=decay)
            for i, decay in ((1, 0.999), (2, 0.9995))
        },
    }
    return aj.Experiment(
        task=summary.summary_task(train, test=test),
        mesh=aj.Mesh(data=1, fsdp=-1, tensor=1),
        stages={
            **(supervised if replies else {"sft": checkpoint}),
            "reader": replace(checkpoint, path=reader, model=T5_XL),
            "rater": replace(checkpoint, path=rater, model=T5_XXL, dtype="bfloat16"),
            "pairs": aj.LoadPairs(comparisons, summary.read_tldr_comparison),
            "truth": aj.LoadPairs(held_out, summary.read_tldr_comparison),
            "preference": fit,
            "reward": replace(fit, form=aj.bradley_terry),
            "judge": aj.ZeroShotPreference("rater"),
            **arms,
            "table": aj.Tournament(
                policies={name: name for name in ("sft", *arms)},
                reference="sft",
                judges={"rater": aj.ModelJudge("judge")},
                prompts=2000,
                writing=aj.Writing(max_new_tokens=NEW_TOKENS, buckets=POSTS, batch=128),
            ),
        },
    )
