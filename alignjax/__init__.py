"""alignjax: aligning language models by pairwise preference, in JAX.

    import alignjax as aj

has what a notebook or an experiment needs. Names are loaded when they are first used, so that ``import alignjax`` is
fast and a part of the package needs only its own dependencies.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    # records
    "alignjax.types": (
        "Estimates",
        "Extras",
        "PolicyFunctions",
        "PreferenceBatch",
        "Response",
        "Roles",
        "Tokens",
        "TrainState",
        "pair_batch",
    ),
    "alignjax.errors": ("RunAgain", "UserError"),
    # objectives: a loss with the adapter that scores a batch for it
    "alignjax.objectives": (
        "DirectAlignment",
        "GroupGradient",
        "IterativeAlignment",
        "KLTarget",
        "OpponentAlignment",
        "PPO",
        "PreferenceGradient",
        "RewardGradient",
    ),
    # samplers: who writes the responses
    "alignjax.sampling.samplers": ("Sampler", "mixture", "moving_average", "policy", "reference"),
    "alignjax.sampling.process": ("Sampling", "geometric_mixture", "sample"),
    # models
    "alignjax.models.config": ("T5Config", "TransformerConfig"),
    "alignjax.models.build": ("build",),
    "alignjax.models.log_probs": ("log_prob", "policy_functions"),
    "alignjax.models.lora": ("Lora",),
    # preference models, labelling methods and judges
    "alignjax.preferences.preference_models": (
        "bradley_terry",
        "choice",
        "one_order",
        "pairwise",
        "pairwise_head",
    ),
    "alignjax.labeling.rlcd": ("RLCD",),
    "alignjax.labeling.judged": ("Judged",),
    "alignjax.labeling.rated": ("RLAIF", "Rating"),
    "alignjax.pipeline.raters": ("JudgeSizes", "LanguageModelRater"),
    "alignjax.pipeline.judges": ("HTTPJudge", "LanguageModelJudge", "ModelJudge", "Oracle"),
    "alignjax.pipeline.training_judge": ("TrainingJudge",),
    "alignjax.preferences.http_client": ("Limits",),
    "alignjax.preferences.http_judge": ("Prices", "Question", "choice_question", "parse_choice", "parse_however"),
    "alignjax.tasks.task": ("EOS", "Format", "RatedExample", "Task", "Template", "few_shot"),
    # experiments
    "alignjax.distributed.sharding": ("Mesh",),
    "alignjax.training.loop": ("Best", "Loop"),
    "alignjax.training.optimizer": ("Adam",),
    "alignjax.training.metrics": ("read_metrics",),
    "alignjax.fields": ("Kind", "no_effect", "stage_input"),
    "alignjax.pipeline.experiment": ("Context", "Experiment", "Exposure", "Program"),
    "alignjax.pipeline.stages": (
        "Finding",
        "ChoosePolicy",
        "CompareModels",
        "Critic",
        "FineTune",
        "FitPreference",
        "KeptPolicy",
        "Label",
        "LoadAdapter",
        "LoadCheckpoint",
        "LoadPairs",
        "LoadReplies",
        "MeasureAgreement",
        "MeasureBestOf",
        "MixPairs",
        "OfflineData",
        "OnlineData",
        "PairStudy",
        "Pretrain",
        "RatePool",
        "Relabel",
        "ReplyStudy",
        "Study",
        "TaskReplies",
        "Tournament",
        "TrainPolicy",
        "Writing",
        "ZeroShotPreference",
    ),
    "alignjax.pipeline.config": ("load", "load_module"),
    "alignjax.pipeline.run": ("run",),
}
_MODULE_OF = {name: module for module, names in _PUBLIC.items() for name in names}
_ROOMS = ("games", "losses", "tasks")

__all__ = sorted([*_MODULE_OF, *_ROOMS])


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"alignjax.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"alignjax has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
