"""The stage kinds an experiment is made of: where science and machinery meet.

A stage names its inputs by other stages' names and writes ``WORKDIR/<name>/``. ``alignjax.pipeline.run`` decides
whether it runs; here is what it does. Each kind is a frozen dataclass with ``inputs()`` and ``run(context)``.
"""

from alignjax.pipeline.experiment import Context, Experiment, Stage, ancestors, check, order, timed
from alignjax.pipeline.networks import Adapter, Network, Trainable, trainable
from alignjax.pipeline.stages.fit_preference import FitPreference, ZeroShot
from alignjax.pipeline.stages.label import Label, Writing, stop_tokens, unseen_stops
from alignjax.pipeline.stages.pairs import GivenPairs
from alignjax.pipeline.stages.start import Adapted, Pretrain, Pretrained, pack
from alignjax.pipeline.stages.study import Finding, Study
from alignjax.pipeline.stages.tournament import Tournament
from alignjax.pipeline.stages.train_policy import Optimise
from alignjax.training.loop import Adam, Best, Loop, run_loop

__all__ = [
    "Adam",
    "Adapted",
    "Adapter",
    "Best",
    "Context",
    "Experiment",
    "Finding",
    "FitPreference",
    "GivenPairs",
    "Label",
    "Loop",
    "Network",
    "Optimise",
    "Pretrain",
    "Pretrained",
    "Stage",
    "Study",
    "Tournament",
    "Trainable",
    "Writing",
    "ZeroShot",
    "ancestors",
    "check",
    "order",
    "pack",
    "run_loop",
    "stop_tokens",
    "timed",
    "trainable",
    "unseen_stops",
]
