"""The straight line on a real checkpoint and real text: stories about a girl, or happy ones.

    alignjax run experiments/stories.py --workdir runs/girl \\
        --set checkpoint=PATH/stories260K --set openings=PATH/story_premises.jsonl [--set principle=happy]

``checkpoint`` is a Hugging Face folder of any family; with network, ``hf download
nm-testing/llama2.c-stories15M --local-dir PATH`` brings a public, larger one. ``openings`` is a JSON-lines file of
{"prompt": text, "story": number}. No model judges here: the oracle counts pronouns (girl) or reads the
VADER lexicon (happy, which needs the extra ``stories``).

With ``--set documents=PATH/stories.txt.gz`` (stories with <|endoftext|> behind each) the preference model is of
another family and reads another tokenizer's tokens: a GPT-2 pretrained on those stories in the run. Text lies between
them.
"""

from functools import partial

from alignjax import objectives
from alignjax.labeling import methods as labeling
from alignjax.models.decoder import TransformerConfig
from alignjax.pipeline.stages import (
    Adam,
    Experiment,
    FitPreference,
    Label,
    Loop,
    Optimise,
    Pretrain,
    Pretrained,
    Tournament,
    Writing,
)
from alignjax.sampling import samplers as rollout
from alignjax.tasks import stories

NEW_TOKENS = 60
BUCKETS = (32, 48, 80)  # opening lengths in tokens
READER = Pretrain(
    model=TransformerConfig(
        vocab_size=1024, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, hidden=512, family="gpt2",
        positions="learned", context=512, norm="layer", biases=("q", "k", "v", "o", "up", "down"),
        activation="gelu_tanh", gated=False,
    ),
    documents=2000,
    row=256,
    adam=Adam(lr=2e-3, warmup=50, weight_decay=0.01),
    loop=Loop(steps=300, batch=8),
)  # fmt: skip


def get_config(checkpoint: str, openings: str, principle: str = "girl", documents: str = "") -> Experiment:
    writing = Writing(max_new_tokens=NEW_TOKENS, buckets=(64, 128), batch=128)
    return Experiment(
        task=stories.task(openings, principle, documents),
        stages={
            **({"reader": READER} if documents else {}),
            "base": Pretrained(checkpoint),
            "pairs": Label(generator="base", method=labeling.rlcd, split="train", prompts=1024, writing=writing),
            "truth": Label(
                generator="base",
                method=partial(labeling.by_oracle, oracle="oracle", error=0.0),
                split="validation",
                prompts=256,
                writing=writing,
            ),
            "preference": FitPreference(
                start="reader" if documents else "base",
                pairs="pairs",
                truth="truth",
                adam=Adam(lr=1e-3),
                loop=Loop(steps=100, batch=16),
                buckets=BUCKETS,
                response=NEW_TOKENS,
            ),
            "nash_md": Optimise(
                start="base",
                reference="base",
                preference="preference",
                objective=partial(objectives.nash_md, tau=0.05),
                opponent=partial(rollout.mixture, beta=0.25),
                adam=Adam(lr=5e-4, warmup=5),
                loop=Loop(steps=50, batch=32),
                prompts=2048,
                buckets=BUCKETS,
                max_new_tokens=NEW_TOKENS,
                response=NEW_TOKENS,
                unfinished_loses=False,  # most continuations are cut before their story ends
            ),
            "table": Tournament(
                policies={"base": "base", "nash_md": "nash_md"},
                reference="base",
                judges={"oracle": "oracle:oracle"},
                prompts=600,
                writing=writing,
            ),
        },
    )
