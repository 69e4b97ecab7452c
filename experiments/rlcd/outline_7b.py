"""Story outlines at the paper's scale (2307.12950): the arms of ``harmless_7b.py`` on the third task.

    alignjax run experiments/rlcd/outline_7b.py --workdir runs/outline7b --set checkpoint=PATH/llama-7b \\
        --set judge_checkpoint=PATH/llama-30b [--set premises=PATH/premises.jsonl] [--set material=PATH/material.json]
    alignjax plan experiments/rlcd/outline_7b.py --topology v5p:2x4x4     # needs no checkpoint and no data

Premises come from a grammar; ``premises`` is a file of others, {"premise": text} a line. The paper's 40 thousand were
not released, nor were its affixes: the words are ours. PPO takes 20 batches, as the paper fixes it for this task.
Nobody has labelled outlines: the judge of the table is a larger language model, asked which of two is better in both
orders, and no preference model is measured. Its endpoint can judge instead: ``judges={"chat": aj.HTTPJudge(...)}``.
"""

from dataclasses import replace
from pathlib import Path

import alignjax as aj
from alignjax.tasks import outline

HUMAN = ("human", "human_test", "judge", "labels", "agreement")  # of dialogues that people compared
PREMISES = 40_000


def get_config(
    checkpoint: str = "checkpoints/llama-7b",
    judge_checkpoint: str = "checkpoints/llama-30b",
    premises: str = "",
    material: str = "",
    faithful: bool = False,
) -> aj.Experiment:
    """Returns all arms."""
    module = aj.load_module(Path(__file__).with_name("harmless_7b.py"))
    study = module.get_config(checkpoint=checkpoint, faithful=faithful)
    task = outline.outline_task(premises, material)
    stages = {name: stage for name, stage in study.stages.items() if name not in HUMAN}
    for name, stage in stages.items():
        if isinstance(stage, aj.FitPreference):
            stages[name] = replace(stage, truth=None)
        elif isinstance(stage, aj.Label):
            stages[name] = replace(stage, prompts=PREMISES)
        elif isinstance(stage, aj.TrainPolicy):
            # a quarter of the batches of dialogues
            loop, data = replace(stage.loop, steps=stage.loop.steps // 4), replace(stage.data, prompts=PREMISES)
            stages[name] = replace(stage, loop=loop, data=data)
    stages["reader"] = replace(study.stages["base"], path=judge_checkpoint, model=module.LLAMA_30B)
    judge = aj.LanguageModelJudge("reader", task.evaluation_questions["quality"])
    table = replace(stages.pop("table"), judges={"reader": judge})
    return replace(study, task=task, stages={**stages, "table": table})
