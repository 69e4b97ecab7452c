"""What a stage trains of a network: all of its parameters, or adapters over its base; heads, and a critic."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec

from alignjax.errors import UserError
from alignjax.models import lora
from alignjax.models.lora import Lora
from alignjax.pipeline.experiment import NetworkSpec
from alignjax.pipeline.networks import Network, SharedBase, apply_or_abstract
from alignjax.training.learn import Assemble, all_trained
from alignjax.types import Key, Params, Rules


@dataclasses.dataclass(frozen=True)
class TrainedParts:
    """A network's parameters in two parts, each of which may be abstract."""

    params: Params  # trained; arrays of its own, in float32
    base: Params | None  # frozen under adapters; None where everything is trained
    assemble: Assemble  # (params, a tree with ``base``) -> the parameters that an objective takes
    rules: Rules  # sharding rules of the trained parameters
    shared_base: SharedBase | None
    unsaved: frozenset[str] = frozenset()  # names in ``params`` that are no part of the stage's network

    def network(self, start: Network, params: Params) -> Network:
        """Returns the network with these trained parameters, ready to be saved."""
        heads = {name: params[name] for name in params.keys() - start.base.keys() - self.unsaved}
        own = {name: part for name, part in params.items() if name not in heads.keys() | self.unsaved}
        if self.shared_base is None:
            return dataclasses.replace(start, base=own, adapters={}, heads=heads, shared_base=None)
        return dataclasses.replace(start, base={}, adapters=own, heads=heads, shared_base=self.shared_base)


def split_trained(start: Network, spec: Lora | None, heads: Params, key: Key) -> TrainedParts:
    """Returns what training starts from, of a network with arrays or an abstract one.

    Without ``spec`` all of the start's parameters are trained; with it adapters over its base, which continue the
    start's own. ``heads`` are the first heads; a start that has a head of that name continues its own. Raises UserError
    when the start has other adapters.
    """
    rules = (*((rf"^{name}/", PartitionSpec()) for name in heads), *start.model.rules)
    heads = {**heads, **to_float32({name: start.heads[name] for name in heads.keys() & start.heads.keys()})}
    if spec is None:
        params = apply_or_abstract(lambda p: lora.merge(jax.tree.map(_float32, p)), start.params)
        return TrainedParts({**params, **heads}, None, all_trained, rules, None)
    adapters = apply_or_abstract(lambda base: lora.init_adapters(spec, base, key), start.base)
    if start.adapters:
        if start.shared_base is None or start.shared_base.lora != spec:
            present = start.shared_base and start.shared_base.lora
            raise UserError(f"stage {start.stage!r} has adapters {present}, not {spec}; use the same, or None")
        adapters = to_float32(start.adapters)

    def assemble(params: Params, frozen: Any) -> Params:
        return lora.overlay(frozen.base, params, spec.scale)

    shared_base = SharedBase(start.shared_base.stage if start.shared_base else start.stage, spec)
    return TrainedParts({**adapters, **heads}, start.base, assemble, (*lora.ADAPTER_RULES, *rules), shared_base)


def with_critic(parts: TrainedParts, critic: Network, head: str | None) -> TrainedParts:
    """Returns the parts with a critic of its own at ``params["critic"]``, which is trained whole and not saved.

    With ``head`` the value head begins as that head of the critic's network. Raises UserError when there is none.
    """
    if head is not None and head not in critic.heads:
        raise UserError(f"critic.head={head!r} is no head of {critic.stage!r}, which has "
                        f"{', '.join(critic.heads) or 'none'}; name one of those, or None")  # fmt: skip
    backbone = apply_or_abstract(lambda p: lora.merge(jax.tree.map(_float32, p)), critic.params)
    value = {} if head is None else {"value": to_float32(critic.heads[head])}
    rules = tuple((rf"(^|/)critic/(.*/)?{pattern}", spec) for pattern, spec in critic.model.rules)
    return dataclasses.replace(
        parts,
        params={**parts.params, **value, "critic": backbone},
        rules=(*rules, *parts.rules),
        unsaved=frozenset({"critic", "value"}),
    )


def trained_spec(start: NetworkSpec, stage: str, spec: Lora | None, heads: dict[str, Any]) -> NetworkSpec:
    """Returns the NetworkSpec of what ``split_trained`` makes of the stage ``stage``, whose own is ``start``."""
    if spec is None:
        return start._replace(record=dataclasses.replace(start.record, dtype="float32", heads=heads, shared_base=None))
    base = start.record.shared_base.stage if start.record.shared_base else stage
    return start._replace(record=dataclasses.replace(start.record, heads=heads, shared_base=SharedBase(base, spec)))


def to_float32(params: Params) -> Params:
    """Returns a copy in float32: in bfloat16 most steps of Adam would round to nothing."""
    return apply_or_abstract(lambda p: jax.tree.map(_float32, p), params)


def _float32(x: Any) -> Any:
    return x.astype("float32")
