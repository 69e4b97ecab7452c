"""Nash-MD on seventy billion parameters: TL;DR summaries by a Llama chat model, against its own mixture.

    alignjax run experiments/nlhf/llama_70b.py --workdir runs/70b --set checkpoint=PATH --set small=PATH \\
        --set train=PATH/train.jsonl --set test=PATH/test.jsonl --set comparisons=PATH/comparisons.jsonl
    ... --set family=llama2           # Llama 2 instead of 3
    ... --set adapters=False          # every parameter of policy and preference model is trained, not adapters (LoRA)
    ... --set preference=8b           # the preference model is made from the small model, whole
    ... --set mesh.tensor=16          # on a v5e: an eighth of the weights does not fit into one of its chips
    alignjax plan experiments/nlhf/llama_70b.py --topology v5p:4x4x4    # needs no checkpoint and no data

To fetch, with a network: meta-llama/Meta-Llama-3-70B-Instruct (or Llama-2-70b-chat-hf) and Meta-Llama-3-8B-Instruct;
posts and comparisons as for ``tldr_t5_xl.py``. A folder of another size is refused.

Only the algorithm, its tau and its beta are from a paper (2312.00886). No published table has this size. With adapters,
policy, reference, opponent and a preference model of the same size share one frozen base in bfloat16. Without adapters,
each has its own parameters; those that are trained are in float32, with two moments of Adam. Rates, ranks, batches and
lengths are our first choices; nobody has tried them. The judge is the model that the preference model is not made from,
asked without training: the small one, or the base. Llama 2 and the small Llama 3 have different tokenizers, so
responses become text between them.
"""

from dataclasses import replace
from functools import partial

import alignjax as aj
from alignjax.tasks import summary

LLAMA_2_70B = aj.TransformerConfig(  # 2307.09288
    vocab_size=32_000, width=8192, layers=80, heads=64, kv_heads=8, head_dim=128, hidden=28_672, context=4096,
    tied=False,
)  # fmt: skip
LLAMA_3_70B = replace(LLAMA_2_70B, vocab_size=128_256, rope_theta=500_000.0, context=8192)  # 2407.21783, table 3
LLAMA_3_8B = replace(LLAMA_3_70B, width=4096, layers=32, heads=32, hidden=14_336)
FAMILIES = {"llama2": LLAMA_2_70B, "llama3": LLAMA_3_70B}
LORA = aj.Lora(rank=16, alpha=32.0, targets=("q", "k", "v", "o"))
POSTS = (256, 512)  # prompt lengths in tokens
NEW_TOKENS = 64


def get_config(
    checkpoint: str = "checkpoints/llama-70b",
    small: str = "checkpoints/llama-3-8b",
    train: str = "",
    test: str = "",
    comparisons: str = "",
    family: str = "llama3",
    adapters: bool = True,
    preference: str = "same",
) -> aj.Experiment:
    """Returns Nash-MD and self-play; ``preference`` is the model that the preference model is made from."""
    if family not in FAMILIES:
        raise aj.UserError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if preference not in ("same", "8b"):
        raise aj.UserError(f"preference={preference!r} is unknown; choose same or 8b")
    lora, same = LORA if adapters else None, preference == "same"
    base = aj.LoadCheckpoint(
        checkpoint,
        chat=True,
        dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="full",
        decode="scanned",
        model=FAMILIES[family],
    )
    nash_md = aj.TrainPolicy(
        start="base",
        reference="base",
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.008)),
        data=aj.OnlineData(preference="preference", samplers=(aj.policy, aj.mixture(beta=0.125)), prompts=64_000),
        adam=aj.Adam(lr=1e-4 if adapters else 1e-6, warmup=20, schedule="constant", b2=0.999),
        loop=aj.Loop(steps=1000, batch=64, accumulate=2, save_every=50),
        buckets=POSTS,
        max_new_tokens=NEW_TOKENS,
        lora=lora,
    )
    read = partial(summary.read_tldr_comparison, query=summary.CHAT_QUERY)
    return aj.Experiment(
        task=summary.summary_task(train, test=test, query=summary.CHAT_QUERY),
        mesh=aj.Mesh(data=1, fsdp=-1, tensor=8),
        stages={
            "base": base,
            "small": replace(base, path=small, model=LLAMA_3_8B),
            "pairs": aj.LoadPairs(comparisons, read, held_out=0.02),
            "preference": aj.FitPreference(
                start="base" if same else "small",
                pairs="pairs",
                truth="pairs",
                adam=aj.Adam(lr=1e-4 if adapters and same else 3e-6, warmup=80, b2=0.999),
                loop=aj.Loop(steps=1400, batch=64, accumulate=2),
                buckets=POSTS,
                response=NEW_TOKENS + 32,  # of a comparison's summaries
                lora=lora if same else None,
            ),
            "judge": aj.ZeroShotPreference("small" if same else "base"),
            "nash_md": nash_md,
            "self_play": replace(nash_md, data=replace(nash_md.data, samplers=(aj.policy, aj.policy))),
            "table": aj.Tournament(
                policies={name: name for name in ("base", "nash_md", "self_play")},
                reference="base",
                judges={"asked": aj.ModelJudge("judge")},
                prompts=1000,
                writing=aj.Writing(max_new_tokens=NEW_TOKENS, buckets=POSTS, batch=64),
            ),
        },
    )
