"""The stage kinds an experiment is made of: where science and machinery meet.

A stage names its inputs by other stages' names and writes ``WORKDIR/<name>/``. ``alignjax.run`` decides
whether it runs; here is what it does. Each kind is a frozen dataclass with ``inputs()`` and ``run(context)``.
"""

from alignjax.stages.experiment import Context, Experiment, Stage, ancestors, check, order, timed
from alignjax.stages.fit import FitPreference, ZeroShot
from alignjax.stages.given import GivenPairs
from alignjax.stages.label import Label, Writing, stop_tokens, unseen_stops
from alignjax.stages.networks import Adapter, Network, Trainable, trainable
from alignjax.stages.optimise import Optimise
from alignjax.stages.start import Adapted, Pretrain, Pretrained, pack
from alignjax.stages.study import Finding, Study
from alignjax.stages.tournament import Tournament
from alignjax.stages.training import Adam, Best, Loop, run_loop

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
