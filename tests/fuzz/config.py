"""Damaged config.json of every family, against transformers on torch in the same folder."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from alignjax.models.t5 import T5Config
from tests.fuzz.folders import (
    CONFIG,
    GENERATION,
    checked,
    checkpoint_logits,
    documents,
    make_folder,
    make_folders,
    prompts,
)
from tests.fuzz.json_mutations import WHOLE, known_texts, mutations
from tests.fuzz.outcomes import Disagreement, Input
from tests.parity import referee
from tests.test_families import TOLERANCE, checkpoint, expected

OLDER = ("llama3", "gemma3", "gpt_neox", "t5_v11")
"""Fixtures whose config.json is in older words."""


class Reading(NamedTuple):
    """What a folder holds."""

    logits: np.ndarray  # of the fixture's completions, [B, N, V]
    end_tokens: tuple[int, ...]


def inputs(parent: Path, seed: int) -> Iterator[Input]:
    """Yields every damaged config.json; each is written into its folder when it is its turn."""
    folders = make_folders(parent)
    for name in OLDER:
        folders[f"{name}, today"] = _in_words_of_today(name, parent / "today")
    found = documents(CONFIG, folders)
    known = known_texts(list(found.values()))
    for label, folder in folders.items():
        (folder / GENERATION).unlink()  # so that config.json alone says what ends a text
        for change, text in mutations(found[label], known):
            attempt = functools.partial(_attempt, folder.name, folder, text)
            yield Input(f"{label} {change}", (str(folder), CONFIG), attempt, change == WHOLE)


def _in_words_of_today(name: str, parent: Path) -> Path:
    """Returns a folder of a fixture with the config.json that transformers saves now."""
    folder = make_folder(name, parent)
    transformers.AutoConfig.from_pretrained(folder).save_pretrained(folder)
    return folder


def _attempt(name: str, folder: Path, text: str) -> None:
    """Reads the folder with another config.json. Raises Disagreement unless the referee reads the same."""
    (folder / CONFIG).write_text(text)
    ours = read(name, folder)
    try:
        theirs = read_as_referee(name, folder, isinstance(checkpoint(name)[0], T5Config))
    except Refused as refusal:
        theirs = undamaged(name)
        if np.abs(ours.logits - theirs.logits).max() > TOLERANCE:
            raise Disagreement(
                f"logits differ from the undamaged folder's, which the referee refuses: {refusal}"
            ) from None
    compare(ours, theirs)


def read(name: str, folder: Path) -> Reading:
    """Returns what the package reads. Raises UserError where it refuses."""
    stage = checked(folder)
    return Reading(checkpoint_logits(name, stage.config()), stage.tokenizer().end_tokens)


class Refused(Exception):
    """The referee does not open the folder, or finds other tensors than it needs."""


def read_as_referee(name: str, folder: Path, encodes: bool) -> Reading:
    """Returns what transformers reads. Raises Refused where it does not open the folder whole."""
    try:
        model, report = referee.load_model("AutoModelForSeq2SeqLM" if encodes else "AutoModelForCausalLM", folder)
        logits = np.stack(referee_rows(model, name, encodes))
    except Exception as error:  # it raises many kinds
        raise Refused(f"{type(error).__name__}: {error}") from None
    if report.keys() & {"missing_keys", "mismatched_keys", "error_msgs"}:
        raise Refused(str(report))
    ends = model.generation_config.eos_token_id
    return Reading(logits, () if ends is None else tuple(ends) if isinstance(ends, list) else (ends,))


@torch.no_grad()
def referee_rows(model: Any, name: str, encodes: bool) -> list[np.ndarray]:
    """Returns the logits [N, V] that a model of transformers computes of each of a fixture's completions."""
    compute_row = referee.encoded_row if encodes else referee.decoder_row
    rows = zip(prompts(name), expected(name)["completion"], strict=True)
    return [compute_row(model, prompt, completion)[0] for prompt, completion in rows]


@functools.cache
def undamaged(name: str) -> Reading:
    """Returns what the fixture holds."""
    return Reading(checkpoint_logits(name, checkpoint(name)[0]), (1,) if "t5" in name else (2,))


def compare(ours: Reading, theirs: Reading) -> None:
    """Raises Disagreement where logits or end tokens differ; the latter where the referee has any."""
    if ours.logits.shape != theirs.logits.shape:
        raise Disagreement(f"logits have shape {ours.logits.shape}, the referee's {theirs.logits.shape}")
    if not np.allclose(ours.logits, theirs.logits, rtol=0, atol=TOLERANCE, equal_nan=True):
        raise Disagreement(f"logits differ by {np.nanmax(np.abs(ours.logits - theirs.logits)):.1e} from the referee's")
    if theirs.end_tokens and ours.end_tokens != theirs.end_tokens:
        raise Disagreement(f"end tokens are {ours.end_tokens}, the referee's {theirs.end_tokens}")
