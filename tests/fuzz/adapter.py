"""Damaged adapter_config.json over every family, against PEFT in the same folder."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import peft as theirs
import torch

from alignjax.checkpoints import peft
from alignjax.checkpoints.adapter_config import CONFIG_FILE
from alignjax.models import lora
from alignjax.models.t5 import T5Config
from tests.fuzz.config import Refused, referee_rows
from tests.fuzz.folders import our_logits
from tests.fuzz.json_mutations import WHOLE, known_texts, mutations
from tests.fuzz.outcomes import Disagreement, Input
from tests.parity import referee
from tests.parity.cases import ADAPTED
from tests.test_families import FIXTURES, NAMES, TOLERANCE, checkpoint


def inputs(parent: Path, seed: int) -> Iterator[Input]:
    """Yields every damaged adapter_config.json; each is written into its folder when it is its turn."""
    folders = {name: _write_adapter(name, parent / name, seed) for name in NAMES}
    found = {name: json.loads((folder / CONFIG_FILE).read_text()) for name, folder in folders.items()}
    known = known_texts(list(found.values()))
    for name, folder in folders.items():
        undamaged = _our_logits(name, folder)
        for change, text in mutations(found[name], known):
            attempt = functools.partial(_attempt, name, folder, text, undamaged)
            yield Input(f"{name} {change}", (str(folder), CONFIG_FILE), attempt, change == WHOLE)


def _write_adapter(name: str, folder: Path, seed: int) -> Path:
    """Writes random adapters as PEFT does, with ranks and scales that differ between modules; returns their folder."""
    torch.manual_seed(seed)
    targets = ADAPTED.get(checkpoint(name)[0].family, ["q_proj", "v_proj", "down_proj"])
    description = theirs.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, lora_dropout=0.0,
        rank_pattern={targets[0]: 2}, alpha_pattern={rf".*\.0\..*{targets[-1]}": 7},
        use_rslora=name in ("llama2", "t5"), fan_in_fan_out=name == "gpt2",
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # of names of transformers that are deprecated, and of "base", which is no folder
        theirs.get_peft_model(copy.deepcopy(_base(name)), description).save_pretrained(folder)
    path = folder / CONFIG_FILE
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(fields | {"target_modules": sorted(fields["target_modules"])}))  # PEFT's is a set
    return folder


@functools.cache
def _base(name: str) -> Any:
    """Returns the fixture as transformers opens it."""
    return referee.load_model("AutoModelForSeq2SeqLM" if _encodes(name) else "AutoModelForCausalLM", FIXTURES / name)[0]


def _encodes(name: str) -> bool:
    return isinstance(checkpoint(name)[0], T5Config)


def _attempt(name: str, folder: Path, text: str, undamaged: np.ndarray) -> None:
    """Reads the adapters with another adapter_config.json. Raises Disagreement unless PEFT reads the same.

    Where PEFT refuses the folder, the logits must be the undamaged folder's.
    """
    (folder / CONFIG_FILE).write_text(text)
    peft.check_files(folder)
    ours, reason = _our_logits(name, folder), ""
    try:
        expected = _peft_logits(name, folder)
    except Refused as refusal:
        expected, reason = undamaged, f", which PEFT refuses: {refusal}"
    if not np.allclose(ours, expected, rtol=0, atol=TOLERANCE, equal_nan=True):
        raise Disagreement(f"logits differ by {np.nanmax(np.abs(ours - expected)):.1e}{reason}")


def _our_logits(name: str, folder: Path) -> np.ndarray:
    """Returns our logits under the folder's adapters."""
    config, params = checkpoint(name)
    spec, adapters = peft.read_adapters(folder, config)
    return our_logits(name, config, lora.overlay(params, adapters, spec.scale))


def _peft_logits(name: str, folder: Path) -> np.ndarray:
    """Returns PEFT's logits. Raises Refused where it does not open the folder, or misses a tensor."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", "Found missing adapter keys")
            adapted = theirs.PeftModel.from_pretrained(copy.deepcopy(_base(name)), folder).eval()
            return np.stack(referee_rows(adapted, name, _encodes(name)))
    except Exception as error:  # it raises many kinds
        raise Refused(f"{type(error).__name__}: {error}") from None
