"""Table 1 of Nash learning from human feedback (2312.00886) at its size: TL;DR, T5-L policies, a T5-XL that compares.

    alignjax run experiments/nlhf/tldr_t5_xl.py --workdir runs/tldr --set policy=PATH/t5-v1_1-large \\
        --set reader=PATH/t5-v1_1-xl --set rater=PATH/flan-t5-xxl \\
        --set train=PATH/train.jsonl --set test=PATH/test.jsonl \\
        --set comparisons=PATH/comparisons-train.jsonl --set held_out=PATH/comparisons-valid.jsonl
    ... --set sft=PATH/t5-large-sft                                  # already fine-tuned: the start of every policy
    ... --only md3                                                   # an arm as a job of its own
    ... --set "truth.read.confidence=()"                             # measured on all held-out comparisons
    alignjax plan experiments/nlhf/tldr_t5_xl.py --topology v5e:4x4  # needs no checkpoint and no data
    alignjax run experiments/nlhf/table_1.py --workdir runs/table_1 --set run=runs/tldr    # beside the paper's

To fetch, with a network, as safetensors: google/t5-v1_1-large, google/t5-v1_1-xl and google/flan-t5-xxl; the filtered
TL;DR posts, train and test, and the comparisons of openai/summarize-from-feedback (2009.01325), or the same as parquet.
Join the files of comparisons into two: one of the lines whose split is train, one of the others. Lines of other splits
and those on news articles are left out and counted. A folder of another size than T5_LARGE, T5_XL or T5_XXL is refused.

From the paper: data, sizes, the fine-tuned policy as start and reference of every arm, 10,000 steps, tau .008 (of the
reward's policy gradient, RLHF: .05), the betas, the decays of the moving averages (from memory), 2000 comparisons a
cell, the preference model's question with its answers 1 and 2, the comparisons of high confidence as its test.

Ours, where the paper does not say: Adam at a constant 3e-5 and batches of 32, as in 2403.08635 for the same algorithm
(which uses Adafactor); the query, and posts cut so that it has at most 512 tokens, as in 2009.01325; summaries of at
most 64, temperature 1; the preference models' rate and one epoch; the fine-tuning's rate, batch and one epoch; of the
held-out comparisons those of the split valid2. The paper's judge is a larger language model; here it is Flan-T5-XXL,
asked in both orders without training. Batches of 32 divide over 16 devices; with more devices, --set mesh.tensor=4.
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
POSTS = (128, 256, 512)  # prompt lengths in tokens; the posts of longer ones are cut
NEW_TOKENS = 64
EVERY = 200_000  # more posts than there are: all of them


def get_config(
    policy: str = "checkpoints/t5-v1_1-large",
    sft: str = "",
    reader: str = "checkpoints/t5-v1_1-xl",
    rater: str = "checkpoints/flan-t5-xxl",
    train: str = "",
    test: str = "",
    comparisons: str = "",
    held_out: str = "",
    query: str = summary.TLDR_QUERY,
) -> aj.Experiment:
    """Returns the arms of table 1; ``rater`` is the checkpoint that judges.

    ``policy`` is fine-tuned on the summaries of ``train``, unless ``sft`` names a folder that has been.
    """
    checkpoint = aj.LoadCheckpoint(policy, compute_dtype="bfloat16", remat="full", model=T5_LARGE)
    tuned = aj.FineTune(
        start="base",
        pairs="replies",
        adam=aj.Adam(lr=1e-4, warmup=50, b2=0.999),
        loop=aj.Loop(steps=910, batch=128, accumulate=2),  # an epoch of 116,722 posts
        row=max(POSTS),
    )
    replies = aj.LoadReplies(train, partial(summary.read_tldr_demonstration, query=query))
    read = partial(summary.read_tldr_comparison, query=query, splits=("train",), confidence=())
    read_held_out = partial(read, splits=("valid2",), confidence=summary.HIGH_CONFIDENCE)
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
    averages = {f"ema{i}_avg": aj.KeptPolicy(policy=f"ema{i}", at="average") for i in (1, 2)}  # EMA1*, EMA2*
    return aj.Experiment(
        task=summary.summary_task(train, test=test, query=query),
        mesh=aj.Mesh(data=1, fsdp=-1, tensor=1),
        stages={
            **(
                {"sft": replace(checkpoint, path=sft)}
                if sft
                else {"base": checkpoint, "replies": replies, "sft": tuned}
            ),
            "reader": replace(checkpoint, path=reader, model=T5_XL),
            "rater": replace(checkpoint, path=rater, model=T5_XXL, dtype="bfloat16"),
            "pairs": aj.LoadPairs(comparisons, read),
            "truth": aj.LoadPairs(held_out, read_held_out),
            "preference": fit,
            "reward": replace(fit, form=aj.bradley_terry),
            **arms,
            **averages,
            "table": aj.Tournament(
                policies={name: name for name in ("sft", *arms, *averages)},
                reference="sft",
                judges={"rater": aj.LanguageModelJudge("rater", summary.RATER_QUESTION)},
                prompts=2000,
                writing=aj.Writing(max_new_tokens=NEW_TOKENS, buckets=POSTS, batch=128),
            ),
        },
    )
