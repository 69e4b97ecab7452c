"""RLCD at the paper's scale (2307.12950): contrast prompts make LLaMA-7B harmless, by PPO, Nash-MD and a reward's
policy gradient, beside RLAIF, RLCD-Rescore and context distillation.

    alignjax run experiments/rlcd/harmless_7b.py --workdir runs/rlcd7b --set checkpoint=PATH/llama-7b \\
        --set train=PATH/train.jsonl.gz --set test=PATH/test.jsonl.gz
    ... --set labeller=30b --set labeller_checkpoint=PATH/llama-30b       # 30B simulates the data, 7B is trained
    ... --set attribute=helpful                                           # with the files of helpful-base
    ... --set material=PATH/material.json                                 # other words: docs/prompt_material.md
    ... --set rlcd.objective.tau=0.004 --only rlcd                        # a point of the grid, as a job of its own
    ... --set faithful=True                                               # PPO with the faults of the released code
    alignjax plan experiments/rlcd/harmless_7b.py --topology v5p:4x4x4    # needs no checkpoint and no data

To fetch, with a network: the base LLaMA (not a chat model; 7B and 30B of 2302.13971) as Hugging Face folders, for
example huggyllama/llama-7b and huggyllama/llama-30b, in safetensors; and harmless-base/{train,test}.jsonl.gz of
Anthropic's hh-rlhf, whose texts can be offensive. A folder of another size or another norm_eps than LLAMA_7B is
refused.

From the paper: what each model starts from (no supervised fine-tuning; policy, reference, critic and preference models
all start from the base, the critic by way of the reward model), one contrast pair of 16 a prompt, at most 5 tries, 300
new tokens; RLAIF's and Rescore's soft labels by one question in one order; reward models of 512 tokens, batch 16, lr
3e-6, warm-up 3% of one epoch, cosine; PPO with prompts of at most 192 tokens, 80 batches of 512 in 2 epochs of 2
updates, lr 1e-5 after 5 batches and then a line, Adam's eps 1e-5, lambda 1; the grid of tau {.001, .002, .004, .008,
.016, .032}, to be chosen on the validation split (--set table.split=validation); distillation with lr 2e-5, 3 epochs;
1000 test prompts, decoded with top-p .9.

Ours: the words of the affixes and of the questions; pairs whose prompt is longer than 208 tokens are left out, not cut;
PPO in its correct form, with the true KL (``faithful``: ``training.presets.alpacafarm``); distillation packs its
examples into rows, 48 of which hold about the paper's 128. ``nash_md`` and ``policy_gradient`` draw as many replies as
PPO, 160 batches of 256, which they learn from once; their rate ends in a cosine. tau and beta of ``nash_md`` are those
of 2312.00886. The judge is a reward model of the human labels of the training file; no policy was trained against it.
``truth`` measures how far the simulated labels agree with people on held-out dialogues.
"""

from dataclasses import replace
from functools import partial

import alignjax as aj
from alignjax.tasks import dialogue
from alignjax.training import presets

LLAMA_7B = aj.TransformerConfig(  # 2302.13971, table 2
    vocab_size=32_000, width=4096, layers=32, heads=32, kv_heads=32, head_dim=128, hidden=11_008, norm_eps=1e-6,
    tied=False,
)  # fmt: skip
LLAMA_30B = replace(LLAMA_7B, width=6656, layers=60, heads=52, kv_heads=52, hidden=17_920)
NEW_TOKENS = 300
QUERIES = (64, 128, 192)  # prompt lengths in tokens of the policies
EVERY = 50_000  # more prompts than the file holds: all of them


def get_config(
    checkpoint: str = "checkpoints/llama-7b",
    train: str = "",
    test: str = "",
    labeller: str = "7b",
    labeller_checkpoint: str = "checkpoints/llama-30b",
    attribute: str = "harmless",
    material: str = "",
    faithful: bool = False,
) -> aj.Experiment:
    """Returns all arms; ``labeller`` is the size of the model that writes the pairs."""
    if labeller not in ("7b", "30b"):
        raise aj.UserError(f"labeller={labeller!r} is unknown; choose 7b or 30b")
    base = aj.LoadCheckpoint(
        checkpoint, dtype="bfloat16", compute_dtype="bfloat16", remat="full", decode="scanned", model=LLAMA_7B
    )
    writing = aj.Writing(
        max_new_tokens=NEW_TOKENS, buckets=(64, 128, 256, 512), batch=128, sampling=aj.Sampling(top_k=50)
    )  # fmt: skip
    reward = aj.FitPreference(
        start="base",
        pairs="pairs",
        truth="human_test",
        form=aj.bradley_terry,
        adam=aj.Adam(lr=3e-6, warmup=80, b2=0.999),
        loop=aj.Loop(steps=2600, batch=16),  # an epoch of a little over 40 thousand pairs
        buckets=(64, 128, 208),
        response=NEW_TOKENS + 4,  # and what stands around a reply
    )
    nash_md = aj.TrainPolicy(
        start="base",
        reference="base",
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.008)),
        data=aj.OnlineData(preference="preference", samplers=(aj.policy, aj.mixture(beta=0.125)), prompts=EVERY),
        adam=aj.Adam(lr=1e-5, warmup=5, b2=0.999, eps=1e-5),
        loop=aj.Loop(steps=160, batch=256, accumulate=4, save_every=20),
        buckets=QUERIES,
        max_new_tokens=NEW_TOKENS,
    )
    preset = presets.alpacafarm(steps=80, tau=0.004)
    ppo = replace(
        nash_md,
        objective=preset.objective if faithful else aj.PPO(tau=0.004, gae_lambda=1.0),
        critic=aj.Critic("reward"),
        data=replace(nash_md.data, preference="reward", samplers=(aj.policy,)),
        adam=preset.adam,
        loop=replace(preset.loop, accumulate=4, save_every=20),
    )
    distilled = aj.FineTune(
        start="base",
        pairs="pairs",
        adam=aj.Adam(lr=2e-5, warmup=26, b2=0.999),
        loop=aj.Loop(steps=880, batch=48),
        row=512,
    )
    rater = aj.LanguageModelRater("labeller" if labeller == "30b" else "base")
    sizes = aj.JudgeSizes(batch=128, prompt=max(QUERIES), reply=NEW_TOKENS)
    pairs = aj.Label(generator=rater.stage, method=aj.RLCD(), split="train", prompts=EVERY, writing=writing)

    def arm(reward_model: str) -> aj.TrainPolicy:
        """Returns PPO against the reward model of another way to label."""
        return replace(ppo, critic=aj.Critic(reward_model), data=replace(ppo.data, preference=reward_model))

    policies = ("base", "distilled", "rlaif", "rescore", "rlcd", "nash_md", "policy_gradient")
    return aj.Experiment(
        task=dialogue.dialogue_task(train, test, attribute, material),
        mesh=aj.Mesh(data=1, fsdp=-1, tensor=4),
        stages={
            "base": base,
            **({"labeller": replace(base, path=labeller_checkpoint, model=LLAMA_30B)} if labeller == "30b" else {}),
            "pairs": pairs,
            "rlaif_pairs": replace(pairs, method=aj.RLAIF(rater)),
            "rescore_pairs": aj.Relabel(pairs="pairs", judge=rater, sizes=sizes),
            "human": aj.LoadPairs(train, dialogue.read_hh_comparison),
            "human_test": aj.LoadPairs(test, dialogue.read_hh_comparison),
            "reward": reward,
            "rlaif_reward": replace(reward, pairs="rlaif_pairs"),
            "rescore_reward": replace(reward, pairs="rescore_pairs"),
            "preference": replace(reward, form=aj.pairwise),
            "judge": replace(reward, pairs="human"),
            "labels": aj.PairStudy(  # its table 36
                pairs={"RLCD": "pairs", "RLAIF": "rlaif_pairs", "Rescore": "rescore_pairs"},
                judge=aj.ModelJudge("judge"),
                sizes=sizes,
            ),
            "distilled": distilled,
            "rlcd": ppo,
            "rlaif": arm("rlaif_reward"),
            "rescore": arm("rescore_reward"),
            "nash_md": nash_md,
            "policy_gradient": replace(
                nash_md,
                objective=aj.RewardGradient(partial(aj.losses.regularized_policy_gradient, tau=0.008), bound=5.0),
                data=replace(nash_md.data, preference="reward", samplers=(aj.policy, aj.policy)),
            ),
            "agreement": aj.MeasureAgreement(  # the paper's table 5, on dialogues whose prompts the pairs have too
                models={"RLCD": "reward", "RLAIF": "rlaif_reward", "Rescore": "rescore_reward"},
                pairs="human",
                count=2000,
                overlap=True,
                sizes=sizes,
            ),
            "table": aj.Tournament(
                policies={name: name for name in policies},
                reference="base",
                judges={"people": aj.ModelJudge("judge")},
                prompts=1000,
                writing=replace(writing, buckets=QUERIES, sampling=aj.Sampling(top_p=0.9)),
            ),
        },
    )
