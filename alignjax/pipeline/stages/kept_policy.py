"""What a training kept of its policy -> a policy of its own."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from alignjax.errors import UserError
from alignjax.fields import Kind, stage_input
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, Program
from alignjax.pipeline.stages.train_policy import AVERAGE, TrainPolicy


@dataclasses.dataclass(frozen=True)
class KeptPolicy:
    """Makes a policy of parameters that a ``TrainPolicy`` kept: after a step, or their moving average at the end.

    The moving average after n steps is d^n start + (1 - d) sum_k d^(n-k) params_k with d = ``average_decay``, the
    weights of EMA1* and EMA2* in 2312.00886. With ``Loop.best`` it is the one at the best save. The policy's heads are
    no part of it, nor is a critic.
    """

    at: int | str  # one of the training's ``keep_at``, or "average"
    policy: str = stage_input(Kind.POLICY)  # a TrainPolicy
    makes: ClassVar[Kind] = Kind.POLICY
    meanings: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if type(self.at) is not int and self.at != AVERAGE:
            raise UserError(f"KeptPolicy.at={self.at!r} is neither a step nor {AVERAGE!r}; give one of them")

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the trained policy's network, without heads."""
        trained = context.spec(self.policy)
        return trained and trained._replace(record=dataclasses.replace(trained.record, heads={}))

    def exposure(self, context: Context) -> Exposure:
        """Returns what the trained policy depends on."""
        return context.exposure(self.policy)

    def check(self, context: Context) -> None:
        """Raises UserError when the training does not keep these parameters."""
        training, name = context.experiment.stages[self.policy], self.policy
        if not isinstance(training, TrainPolicy):
            raise UserError(f"{context.name}.policy={name!r} is a {type(training).__name__}, which keeps no other "
                            "parameters than its own; name a TrainPolicy")  # fmt: skip
        if self.at == AVERAGE and training.average_decay is None:
            raise UserError(f"{context.name}.at={AVERAGE!r} and {name!r} keeps no moving average; "
                            f"set {name}.average_decay, e.g. 0.999")  # fmt: skip
        if self.at != AVERAGE and self.at not in training.keep_at:
            kept = [*map(str, training.keep_at), *([repr(AVERAGE)] if training.average_decay is not None else [])]
            raise UserError(f"{context.name}.at={self.at!r} is nothing that {name!r} keeps; it keeps "
                            f"{', '.join(kept) or 'nothing'}; name one of those, or set {name}.keep_at")  # fmt: skip

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: the parameters are copied."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the network."""
        trained = context.abstract(self.policy)
        networks.save(context.folder, networks.load_kept(context.folder_of(self.policy), self.at, trained))
        return {}
