"""The stages that an experiment is made of.

Each is a frozen dataclass; ``alignjax.pipeline.experiment.Stage`` says how.
"""

from alignjax.pipeline.stages.agreement import MeasureAgreement
from alignjax.pipeline.stages.best_of import MeasureBestOf
from alignjax.pipeline.stages.choose_policy import ChoosePolicy
from alignjax.pipeline.stages.compare_models import CompareModels
from alignjax.pipeline.stages.fine_tune import FineTune
from alignjax.pipeline.stages.fit_preference import FitPreference, ZeroShotPreference
from alignjax.pipeline.stages.kept_policy import KeptPolicy
from alignjax.pipeline.stages.label import Label
from alignjax.pipeline.stages.load import LoadAdapter, LoadCheckpoint, LoadPairs, LoadReplies
from alignjax.pipeline.stages.pair_study import PairStudy
from alignjax.pipeline.stages.policy_data import OfflineData, OnlineData
from alignjax.pipeline.stages.pretrain import Pretrain
from alignjax.pipeline.stages.rate_pool import RatePool
from alignjax.pipeline.stages.relabel import MixPairs, Relabel
from alignjax.pipeline.stages.reply_study import ReplyStudy
from alignjax.pipeline.stages.study import Finding, Study
from alignjax.pipeline.stages.task_replies import TaskReplies
from alignjax.pipeline.stages.tournament import Tournament
from alignjax.pipeline.stages.train_policy import Critic, TrainPolicy
from alignjax.pipeline.stages.writing import Writing

__all__ = [
    "ChoosePolicy",
    "CompareModels",
    "Critic",
    "Finding",
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
]
