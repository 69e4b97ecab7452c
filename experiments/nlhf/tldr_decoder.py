"""TL;DR with decoder-only models: Pythia of 1B or 2.8B fine-tuned, then PPO, its policy gradient, and Nash-MD.

    alignjax run experiments/nlhf/tldr_decoder.py --workdir runs/tldr1b --set checkpoint=PATH/pythia-1b-deduped \\
        --set rater=PATH/flan-t5-xxl --set train=PATH/train.jsonl --set test=PATH/test.jsonl \\
        --set comparisons=PATH/comparisons-train.jsonl --set held_out=PATH/comparisons-valid.jsonl
    ... --set size=2.8b --set checkpoint=PATH/pythia-2.8b-deduped
    alignjax plan experiments/nlhf/tldr_decoder.py --topology v5e:4x4    # needs no checkpoint and no data
    alignjax run experiments/nlhf/table_1.py --workdir runs/table_1 --set run=runs/tldr1b

To fetch, with a network, as safetensors: EleutherAI/pythia-1b-deduped or pythia-2.8b-deduped and google/flan-t5-xxl;
posts and comparisons as for ``tldr_t5_xl.py``. A folder of another size is refused.

From 2403.17031 (``presets.tldr_details`` for PPO): the query, its post cut at the last newline so that it has at most
512 tokens; replies of at most 53 tokens, of a comparison 169; the reward model made from the fine-tuned policy, one
epoch at 3e-6 with a cosine; PPO with tau .05 on a million replies at temperature .7, its critic made from the reward
model. It published (read off charts; judged by GPT-3.5 against the posts' own summaries) of 1B and 2.8B: rates of .33
and .40 for the fine-tuned policy, of .20 to .62 (four seeds) and .70 to .75 for PPO; accuracies of .63 and .67 for the
reward model, on all held-out comparisons.

Ours: the fine-tuning's and the preference model's settings, which are those of the reward model; ``gradient`` (RLHF
without a critic) and ``md1`` (Nash-MD) are arms of ``tldr_t5_xl.py``, at temperature 1 and a tenth of its rate. That
program subtracts from the rewards their mean over the posts' own summaries, and pays -1 for a reply without an end;
here rewards are as fitted, and such a reply gets 1 less than the lowest of its batch. Summaries longer than the limits
are left out, not cut. The judge is Flan-T5-XXL, asked in both orders; it compares with the fine-tuned policy's
summaries, not with people's.
"""

from dataclasses import replace
from pathlib import Path

import alignjax as aj
from alignjax.tasks import summary
from alignjax.training import presets

PYTHIA_1B = aj.TransformerConfig(  # 2304.01373, table 1
    vocab_size=50_304, width=2048, layers=16, heads=8, kv_heads=8, head_dim=256, hidden=8192, tied=False,
    family="gpt_neox", norm="layer", biases=("q", "k", "v", "o", "up", "down"), activation="gelu", gated=False,
    parallel=True, rotary_dim=64,
)  # fmt: skip
PYTHIA_3B = replace(PYTHIA_1B, width=2560, layers=32, heads=32, kv_heads=32, head_dim=80, hidden=10_240, rotary_dim=20)
SIZES = {"1b": PYTHIA_1B, "2.8b": PYTHIA_3B}
NEW_TOKENS = 53
SHARED = ("replies", "rater", "pairs", "truth")
t5 = aj.load_module(Path(__file__).with_name("tldr_t5_xl.py"))


def get_config(
    checkpoint: str = "checkpoints/pythia-1b-deduped",
    size: str = "1b",
    rater: str = "checkpoints/flan-t5-xxl",
    train: str = "",
    test: str = "",
    comparisons: str = "",
    held_out: str = "",
) -> aj.Experiment:
    """Returns fine-tuning, both models of preference, three ways to learn from them, and the table."""
    if size not in SIZES:
        raise aj.UserError(f"size={size!r} is unknown; choose {' or '.join(SIZES)}")
    study = t5.get_config(
        rater=rater, train=train, test=test, comparisons=comparisons, held_out=held_out, query=summary.TLDR_QUERY
    )
    base = replace(study.stages["base"], path=checkpoint, decode="scanned", model=SIZES[size])
    fit = replace(
        study.stages["preference"],
        start="sft",
        adam=aj.Adam(lr=3e-6, warmup=0, b2=0.999, eps=1e-5),
        loop=aj.Loop(steps=1450, batch=64),  # an epoch of 92,820 comparisons
        response=169,
    )
    preset = presets.tldr_details(steps=1953)  # a million replies
    objective = replace(preset.objective, invalid=aj.PPO(tau=preset.objective.tau).invalid)
    loop = replace(preset.loop, accumulate=16, save_every=100)
    ppo = aj.TrainPolicy(
        **preset._replace(objective=objective, loop=loop)._asdict(),
        start="sft",
        reference="sft",
        data=aj.OnlineData(preference="reward", samplers=(aj.policy,), prompts=t5.EVERY),
        critic=aj.Critic("reward", head="reward"),
        buckets=t5.POSTS,
        max_new_tokens=NEW_TOKENS,
    )
    slower = {"adam": aj.Adam(lr=3e-6, warmup=0, schedule="constant", b2=0.999), "max_new_tokens": NEW_TOKENS}
    arms = {
        "rlhf": ppo,
        "gradient": replace(study.stages["rlhf"], **slower),
        "md1": replace(study.stages["md1"], **slower),
    }
    table = study.stages["table"]
    stages = {
        "base": base,
        **{name: study.stages[name] for name in SHARED},
        "sft": replace(
            study.stages["sft"],
            adam=fit.adam,
            row=max(t5.POSTS) + 64,
            shorten_to=max(t5.POSTS),
        ),
        "preference": fit,
        "reward": replace(fit, form=aj.bradley_terry),
        **arms,
        "table": replace(
            table,
            policies={name: name for name in ("sft", *arms)},
            writing=replace(table.writing, max_new_tokens=NEW_TOKENS),
        ),
    }
    return replace(study, stages=stages)
