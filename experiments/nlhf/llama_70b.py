"""Nash-MD on seventy billion parameters: TL;DR summaries by a Llama chat model, against its own mixture.

    alignjax run experiments/nlhf/llama_70b.py --workdir runs/70b --set checkpoint=PATH --set small=PATH \\
        --set train=PATH/train.jsonl --set test=PATH/test.jsonl --set comparisons=PATH/comparisons.jsonl
    ... --set family=llama2           # Llama 2 instead of 3
    ... --set adapters=False          # every parameter of policy and preference model is trained, not adapters (LoRA)
    ... --set preference=8b           # the preference model is made from the small model, whole
    ... --set mesh.tensor=16          # on a v5e, whose chips have no room for an eighth of the weights
    alignjax plan experiments/nlhf/llama_70b.py --topology v5p:4x4x4    # needs no checkpoint and no data

To fetch, with a network: meta-llama/Meta-Llama-3-70B-Instruct (or Llama-2-70b-chat-hf) and Meta-Llama-3-8B-Instruct;
posts and comparisons as for ``tldr_t5_xl.py``. A folder of another size is refused by name.

Nothing here is from a paper but the algorithm and its tau and beta (2312.00886): no published table has this size.
With adapters, policy, reference, opponent and a preference model of the same size lie over one frozen base in
bfloat16; without, each has its parameters, and the trained ones theirs in float32 with Adam's two moments. Rates,
ranks, batches and lengths are our first choices, which nobody has tried. The judge is the model that the preference
model is not made from, asked as it is: the small one, or the base. Between Llama 2 and the small Llama 3 text lies:
their tokenizers differ.
"""

from dataclasses import replace
from functools import partial

from alignjax import objectives
from alignjax.distributed.sharding import Mesh
from alignjax.errors import UserError
from alignjax.models.decoder import TransformerConfig
from alignjax.models.lora import Lora
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
from alignjax.sampling import samplers as rollout
from alignjax.tasks import summary

LLAMA_2_70B = TransformerConfig(  # 2307.09288
    vocab_size=32_000, width=8192, layers=80, heads=64, kv_heads=8, head_dim=128, hidden=28_672, context=4096,
    tied=False,
)  # fmt: skip
LLAMA_3_70B = replace(LLAMA_2_70B, vocab_size=128_256, rope_theta=500_000.0, context=8192)  # 2407.21783, table 3
LLAMA_3_8B = replace(LLAMA_3_70B, width=4096, layers=32, heads=32, hidden=14_336)
FAMILIES = {"llama2": LLAMA_2_70B, "llama3": LLAMA_3_70B}
LORA = Lora(rank=16, alpha=32.0, targets=("q", "k", "v", "o"))
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
) -> Experiment:
    if family not in FAMILIES:
        raise UserError(f"family={family!r} is unknown; choose one of {', '.join(FAMILIES)}")
    if preference not in ("same", "8b"):
        raise UserError(f"preference={preference!r} is unknown; choose same or 8b")
    lora, same = LORA if adapters else None, preference == "same"
    base = Pretrained(
        checkpoint,
        chat=True,
        dtype="bfloat16",
        compute_dtype="bfloat16",
        remat="full",
        decode="scanned",
        model=FAMILIES[family],
    )
    nash_md = Optimise(
        start="base",
        reference="base",
        preference="preference",
        objective=partial(objectives.nash_md, tau=0.008),
        opponent=partial(rollout.mixture, beta=0.125),
        adam=Adam(lr=1e-4 if adapters else 1e-6, warmup=20, schedule="constant", b2=0.999),
        loop=Loop(steps=1000, batch=64, accumulate=2, save_every=50),
        prompts=64_000,
        buckets=POSTS,
        max_new_tokens=NEW_TOKENS,
        lora=lora,
    )
    return Experiment(
        task=summary.task(train, test=test, ask=summary.CHAT),
        mesh=Mesh(data=1, fsdp=-1, tensor=8),
        stages={
            "base": base,
            "small": replace(base, path=small, model=LLAMA_3_8B),
            "pairs": GivenPairs(comparisons, partial(summary.comparison, ask=summary.CHAT), held_out=0.02),
            "preference": FitPreference(
                start="base" if same else "small",
                pairs="pairs",
                truth="pairs",
                adam=Adam(lr=1e-4 if adapters and same else 3e-6, warmup=80, b2=0.999),
                loop=Loop(steps=1400, batch=64, accumulate=2),
                buckets=POSTS,
                response=NEW_TOKENS + 32,  # of a comparison's summaries
                lora=lora if same else None,
            ),
            "judge": ZeroShot("small" if same else "base"),
            "nash_md": nash_md,
            "self_play": replace(nash_md, opponent=rollout.self_play),
            "table": Tournament(
                policies={name: name for name in ("base", "nash_md", "self_play")},
                reference="base",
                judges={"asked": "judge"},
                prompts=1000,
                writing=Writing(max_new_tokens=NEW_TOKENS, buckets=POSTS, batch=64),
            ),
        },
    )
