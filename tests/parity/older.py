"""What transformers 4.57 makes of folders: ``python -m tests.parity.older FOLDER``, with 4.57 before 5 on the path.

FOLDER holds ``texts.json``, a folder NAME for each model or tokenizer, and for a model ``NAME-inputs.npz``: prompts
[B, T] with their mask and completions [B, N]. Writes ``NAME.npz``, the logits, and ``NAME.json``: the tensors that did
not fit, and what the tokenizer does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from transformers import GenerationConfig

from tests.parity import referee


def main(folder: Path) -> None:
    """Opens every model of the folder and writes what it computes."""
    if not transformers.__version__.startswith("4.57."):
        raise SystemExit(f"transformers {transformers.__version__} is not 4.57; run `make parity`")
    texts = json.loads((folder / "texts.json").read_text("utf-8"))
    for path in sorted(folder.iterdir()):
        if (path / "tokenizer.json").exists():
            described = describe_tokenizer(path, texts)
            if (path / "config.json").exists():
                described |= open_model(path, dict(np.load(folder / f"{path.name}-inputs.npz")), folder)
            (folder / f"{path.name}.json").write_text(json.dumps(described), "utf-8")


def open_model(path: Path, inputs: dict[str, np.ndarray], out: Path) -> dict[str, Any]:
    """Writes the logits of one model; returns its end tokens and the tensors that did not fit."""
    kind = json.loads((path / "config.json").read_text("utf-8"))["architectures"][0]
    model, mismatches = referee.load_model(kind, path)
    prompts = [row[mask].tolist() for row, mask in zip(inputs["tokens"], inputs["mask"], strict=True)]
    np.savez(out / f"{path.name}.npz", logits=referee.compute_logits(model, prompts, inputs["completion"]))
    return {"mismatches": mismatches, "end_tokens": GenerationConfig.from_pretrained(path).eos_token_id}


def describe_tokenizer(path: Path, texts: list[str]) -> dict[str, Any]:
    """Returns the ids of texts with and without special tokens, their text again, the specials and a chat."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    bare = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return {
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "bare": bare,
        "texts": [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in bare],
        "specials": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "chat": tokenizer.apply_chat_template([{"role": "user", "content": texts[0]}], tokenize=False)
        if tokenizer.chat_template
        else None,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
