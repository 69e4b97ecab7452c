"""What a stage amounts to, and a digest of it: stages with one fingerprint make one result, whatever their names."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import alignjax
from alignjax.fields import no_effect_paths, stage_inputs
from alignjax.pipeline.description import describe
from alignjax.reporting.tables import flatten


def fingerprint(experiment: Any, name: str, stage: Any = None) -> str:
    """Returns the digest of everything that can change the result of a stage: its configuration, the task's, the
    experiment's seed, and the fingerprints of its inputs. ``stage`` stands for the named one where it is given."""
    content = {
        "config": describe(experiment.stages[name] if stage is None else stage, _input_digests(experiment)),
        "task": describe(experiment.task, str),
        "seed": experiment.seed,
    }
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _input_digests(experiment: Any) -> Any:
    return functools.partial(fingerprint, experiment)


def resolve(experiment: Any, name: str) -> dict[str, Any]:
    """Returns the record of a stage before it runs: its fingerprint, and in words what that is made of."""
    stage = experiment.stages[name]
    return {
        "fingerprint": fingerprint(experiment, name),
        "stage": name,
        "config": {"kind": type(stage).__name__, **describe(stage)},
        "task": describe(experiment.task),
        "seed": experiment.seed,
        "inputs": {source: fingerprint(experiment, source) for source in sorted(input_names(stage))},
        "code": code_version(),
    }


def input_names(stage: Any) -> list[str]:
    """Returns the names of the stages that a stage reads, each once."""
    return list(dict.fromkeys(name for _, name, _ in stage_inputs(stage)))


def difference(found: Mapping[str, Any], record: Mapping[str, Any], stage: Any) -> str:
    """Returns the first leaf that can change a result in which two records of the stage differ, in words.

    An input counts as changed where its fingerprint is another one, whatever its name.
    """
    ignored = {f"config.{path}" for path in no_effect_paths(stage)}
    named = [f"config.{path}" for path, _, _ in stage_inputs(stage)]
    old, new = (dict(flatten({k: r.get(k) for k in ("config", "task", "seed")})) for r in (found, record))
    for name in [*new, *old]:
        if old.get(name) != new.get(name) and name not in {*ignored, *named}:
            return f"{name.removeprefix('config.')}={old.get(name)!r}, now {new.get(name)!r}"
    for name in named:
        digests = [r.get("inputs", {}).get(leaves.get(name)) for r, leaves in ((found, old), (record, new))]
        if digests[0] != digests[1] and old.get(name) != new.get(name):
            return f"{name.removeprefix('config.')}={old.get(name)!r}, now {new.get(name)!r}"
        if digests[0] != digests[1]:
            return f"inputs.{new.get(name)}={digests[0]!r}, now {digests[1]!r}"
    return "another configuration"


@functools.cache
def code_version() -> str:
    """Returns the package's version and, in a checkout, its commit (with + when it has changes)."""
    words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        result = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return alignjax.__version__
    commit = result.stdout.strip() if result.returncode == 0 else ""
    return f"{alignjax.__version__} {commit}".strip()
