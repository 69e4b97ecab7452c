"""Damaged generation_config.json in the folder of every family: first and end tokens against transformers' reading."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import transformers

from alignjax.models.t5 import T5Config
from tests.fuzz.folders import GENERATION, checked, documents, make_folders
from tests.fuzz.json_mutations import WHOLE, mutations
from tests.fuzz.outcomes import Disagreement, Input


def inputs(parent: Path, seed: int) -> Iterator[Input]:
    """Yields every damaged generation_config.json; each is written into its folder when it is its turn."""
    folders = make_folders(parent)
    for name, document in documents(GENERATION, folders).items():
        for change, text in mutations(document):
            attempt = functools.partial(_attempt, folders[name], text, tuple(document["eos_token_id"]))
            yield Input(f"{name} {change}", (str(folders[name] / GENERATION),), attempt, change == WHOLE)


def _attempt(folder: Path, text: str, undamaged: tuple[int, ...]) -> None:
    """Reads the folder's end tokens and its first token. Raises Disagreement unless they are the referee's.

    Where the referee refuses the file they must be the undamaged ones; where it has none, those of config.json.
    """
    (folder / GENERATION).write_text(text)
    stage = checked(folder)
    ours, config = stage.tokenizer().end_tokens, stage.config()
    try:
        theirs = transformers.GenerationConfig.from_pretrained(folder)
    except Exception:  # it raises many kinds
        theirs = transformers.GenerationConfig(eos_token_id=list(undamaged))
    ends = theirs.eos_token_id
    if ends is None or ends == []:
        ends = transformers.AutoConfig.from_pretrained(folder).eos_token_id
    if ours != (expected := tuple(ends) if isinstance(ends, list) else (ends,)):
        raise Disagreement(f"end tokens are {ours}, the referee's {expected}")
    start = theirs.decoder_start_token_id
    if isinstance(config, T5Config) and start is not None and start != config.start_token:
        raise Disagreement(f"a text starts with {config.start_token}, the referee's with {start}")
