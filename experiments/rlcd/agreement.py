"""How preference models agree with people, in the form of Table 5 of 2307.12950, on a real checkpoint and real labels.

    alignjax run experiments/rlcd/agreement.py --workdir runs/agreement \\
        --set checkpoint=PATH/stories260K --set comparisons=PATH/hh_harmless_base_test.jsonl.gz

``checkpoint`` is a Hugging Face folder of any decoder-only family. ``comparisons`` is a file of Anthropic's HH
dialogues, whose texts can be offensive: nothing here shows one. The last half of its prompts is held out, and all that
is measured lies there.

``people`` is fitted to the human labels of the first half. ``RLCD`` is fitted to pairs that a writer simulated from
prompts of that half. The writer is the checkpoint, fine-tuned on the replies that people preferred there, because a
model that never saw a dialogue does not end its reply. ``people`` is what these sizes can learn from labels; RLCD shows
what a writer that small knows of the words in a role marker.

With stories260K (260 thousand parameters, 512 tokens of context) and the test file of harmless-base, on 408 held-out
pairs; 743 others are longer than 256 tokens and twice 128:

    model   accuracy, %        mean probability
    people  57.1 [52.1, 62.0]  0.536 [0.519, 0.553]
    RLCD    47.3 [42.4, 52.3]  0.479 [0.450, 0.508]

So 402 human labels teach a model of this size a little, if anything. 300 simulated pairs teach it nothing that shows:
the writer does not know what the affixes mean. One other run, with half the steps everywhere, measured 53.7 [48.7,
58.6] and 48.8 [43.8, 53.7]. The first took 26 minutes on two cores that many used, the other 7 minutes.
"""

from dataclasses import replace

import alignjax as aj
from alignjax.tasks import dialogue

PROMPTS, REPLY = (64, 128, 256), 128  # lengths in tokens
AFFIXED = (96, 192, 384)  # prompts with affixes


def get_config(checkpoint: str, comparisons: str, small: bool = False) -> aj.Experiment:
    """Returns the measurement; ``small`` is a short form that learns little."""
    people = aj.FitPreference(
        start="base",
        pairs="human",
        form=aj.bradley_terry,
        adam=aj.Adam(lr=1e-3, warmup=10),
        loop=aj.Loop(steps=100, batch=16),
        buckets=PROMPTS,
        response=REPLY,
    )
    writer = aj.FineTune(
        start="base",
        pairs="human",
        adam=aj.Adam(lr=2e-3, warmup=20),
        loop=aj.Loop(steps=200, batch=4),
        row=512,
    )
    simulated = aj.Label(
        generator="writer",
        method=aj.RLCD(),
        split="validation",
        prompts=512,
        writing=aj.Writing(max_new_tokens=REPLY, buckets=AFFIXED, batch=64),
    )
    if small:
        people = replace(people, loop=aj.Loop(steps=4, batch=4))
        writer = replace(writer, loop=aj.Loop(steps=20, batch=2))
        simulated = replace(simulated, prompts=32, writing=replace(simulated.writing, batch=32))
    task = dialogue.dialogue_task(test=comparisons)
    assert task.template is not None
    # A reward asks no question. This answer is one token of a tokenizer of 512 tokens too.
    template = task.template._replace(answer=" the", other="")
    return aj.Experiment(
        task=replace(task, template=template),
        stages={
            "base": aj.LoadCheckpoint(checkpoint),
            "human": aj.LoadPairs(comparisons, dialogue.read_hh_comparison, held_out=0.5),
            "writer": writer,
            "rlcd_pairs": simulated,
            "people": people,
            "rlcd": replace(people, pairs="rlcd_pairs"),
            "agreement": aj.MeasureAgreement(
                models={"people": "people", "RLCD": "rlcd"},
                pairs="human",
                split="held_out",
                count=2000,
                sizes=aj.JudgeSizes(batch=32, prompt=max(PROMPTS), reply=REPLY),
            ),
        },
    )
