"""The quickstart's line on a real checkpoint and real text: stories about a girl, or happy ones.

    alignjax run experiments/stories.py --workdir runs/girl \\
        --set checkpoint=PATH/stories260K --set openings=PATH/story_premises.jsonl [--set principle=happy]

``checkpoint`` is a Hugging Face folder of any family. With a network, ``hf download nm-testing/llama2.c-stories15M
--local-dir PATH`` fetches a public, larger one. ``openings`` is a JSON-lines file of {"prompt": text, "story": number}.
No model judges: the oracle counts pronouns (girl) or reads the VADER lexicon (happy, which needs the extra
``stories``).

With ``--set documents=PATH/stories.txt.gz`` (stories, each followed by <|endoftext|>) the preference model is a GPT-2
that is pretrained on those stories in the run. It has its own tokenizer, and responses become text between the two.
"""

from functools import partial

import alignjax as aj
from alignjax.tasks import stories

NEW_TOKENS = 60
BUCKETS = (32, 48, 80)  # opening lengths in tokens
READER = aj.Pretrain(
    model=aj.TransformerConfig(
        vocab_size=1024, width=128, layers=2, heads=4, kv_heads=4, head_dim=32, hidden=512, family="gpt2",
        positions="learned", context=512, norm="layer", biases=("q", "k", "v", "o", "up", "down"),
        activation="gelu_tanh", gated=False,
    ),
    documents=2000,
    row=256,
    adam=aj.Adam(lr=2e-3, warmup=50, weight_decay=0.01),
    loop=aj.Loop(steps=300, batch=8),
)  # fmt: skip


def get_config(checkpoint: str, openings: str, principle: str = "girl", documents: str = "") -> aj.Experiment:
    """Returns Nash-MD on the checkpoint; ``principle`` is girl or happy."""
    writing = aj.Writing(max_new_tokens=NEW_TOKENS, buckets=(64, 128), batch=128)
    return aj.Experiment(
        task=stories.stories_task(openings, principle, documents),
        stages={
            **({"reader": READER} if documents else {}),
            "base": aj.LoadCheckpoint(checkpoint),
            "pairs": aj.Label(generator="base", method=aj.RLCD(), split="train", prompts=1024, writing=writing),
            "truth": aj.Label(
                generator="base",
                method=aj.Judged(aj.Oracle("oracle")),
                split="validation",
                prompts=256,
                writing=writing,
            ),
            "preference": aj.FitPreference(
                start="reader" if documents else "base",
                pairs="pairs",
                truth="truth",
                adam=aj.Adam(lr=1e-3),
                loop=aj.Loop(steps=100, batch=16),
                buckets=BUCKETS,
                response=NEW_TOKENS,
            ),
            "nash_md": aj.TrainPolicy(
                start="base",
                reference="base",
                objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=0.05)),
                data=aj.OnlineData(
                    preference="preference",
                    samplers=(aj.policy, aj.mixture(beta=0.25)),
                    prompts=2048,
                    response=NEW_TOKENS,
                    unfinished_loses=False,  # most continuations are cut before their story ends
                ),
                adam=aj.Adam(lr=5e-4, warmup=5),
                loop=aj.Loop(steps=50, batch=32),
                buckets=BUCKETS,
                max_new_tokens=NEW_TOKENS,
            ),
            "table": aj.Tournament(
                policies={"base": "base", "nash_md": "nash_md"},
                reference="base",
                judges={"oracle": aj.Oracle("oracle")},
                prompts=600,
                writing=writing,
            ),
        },
    )
