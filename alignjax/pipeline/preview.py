"""A quick look at any checkpoint: one prompt, streamed; or two checkpoints side by side."""

from __future__ import annotations

import itertools
import json
import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

import jax
import numpy as np

from alignjax.checkpoints import huggingface, weights
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.models.tokenizer import Tokenizer, as_chat, decode_continuation, pad, stop_sequences
from alignjax.pipeline import networks
from alignjax.pipeline.networks import Network
from alignjax.sampling.generate import Generate, generator
from alignjax.sampling.process import Process, Sampling, Stop, sample
from alignjax.tasks.task import one_message

BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # prompt lengths in tokens


def one_device() -> jax.sharding.Mesh:
    """A look needs no more."""
    return sharding.make_mesh(sharding.Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1])


def opened(folder: Path, chat: bool) -> Network:
    """A Hugging Face folder, or a finished stage WORKDIR/NAME, on one device. Raises UserError."""
    mesh = one_device()
    if (folder / "model.json").exists():
        found = networks.load(folder.parent, folder.name, mesh, {}, None)
        tokenizer = as_chat(found.tokenizer, one_message) if chat else found.tokenizer
        return Network(found.name, found.model, found.params, tokenizer, found.fingerprint)
    if storage.is_bucket(folder):
        raise UserError(f"{folder} is no finished stage's; a Hugging Face folder must lie on this machine: copy it")
    config = huggingface.read_config(folder)
    model, tokenizer = build(config), huggingface.read_tokenizer(folder)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    where = sharding.shardings(shapes, sharding.live(model.rules, shapes), mesh)
    params = weights.read_params(folder, config, where)
    return Network(folder.name, model, params, as_chat(tokenizer, one_message) if chat else tokenizer, "")


def stream(
    network: Network,
    prompt: str,
    stop: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    out: TextIO | None = None,
) -> None:
    """Writes what the model says after the prompt, token by token, as it is drawn. UserError when it does not fit."""
    tokenizer, out = network.tokenizer, out or sys.stdout
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty, and this tokenizer puts nothing before it; give some text")
    longest = [bucket for bucket in BUCKETS if bucket >= len(ids)]
    if not longest:
        raise UserError(f"the prompt has {len(ids)} tokens, and the longest is {BUCKETS[-1]}; shorten it")
    stops = stops_of(tokenizer, stop)
    speak = speaker(tokenizer, {sequence[0] for sequence in stops if len(sequence) == 1}, out)

    def run(params, prompt, key):
        process = Process(*network.model.start(params, prompt, max_new_tokens))

        def step(carry, token):
            jax.debug.callback(speak, token[0], ordered=True)
            return process.step(carry, token)

        return sample(process._replace(step=step), key[None], max_new_tokens, stops, sampling).completion.mask

    length = min(longest)
    if getattr(network.model.config, "positions", "") == "learned":  # a bucket may be longer than there are positions
        length = max(min(length, network.model.config.context - max_new_tokens), len(ids))
    jax.block_until_ready(jax.jit(run)(network.params, pad([ids], length), jax.random.key(seed)))
    jax.effects_barrier()
    out.write("\n")


def stops_of(tokenizer: Tokenizer, stop: str | None) -> Stop:
    """The tokenizer's end tokens, and a text that ends a reply too."""
    return (*((end,) for end in tokenizer.ends), *(stop_sequences(tokenizer, stop) if stop is not None else ()))


def speaker(tokenizer: Tokenizer, ends: set[int], out: TextIO) -> Callable[[np.ndarray], None]:
    """token -> writes the text that it completes; nothing from the first end token on, and no half character."""
    ids: list[int] = []
    told = [0]

    def speak(token: np.ndarray) -> None:
        if ids and ids[-1] in ends:
            return
        ids.append(int(token))
        if ids[-1] in ends:
            return
        text = decode_continuation(tokenizer, ids)
        if not text.endswith("�"):
            out.write(text[told[0] :])
            out.flush()
            told[0] = len(text)

    return speak


def read_prompts(path: Path) -> list[str]:
    """JSON lines {"prompt": text}, or one prompt a line. Raises UserError when there is none."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a file with one prompt a line") from None
    if not lines:
        raise UserError(f"{path} holds no prompts; write one a line")
    if not lines[0].lstrip().startswith("{"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            prompts.append(json.loads(line)["prompt"])
            if not isinstance(prompts[-1], str):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number} is not {{"prompt": text}}; mend it') from None
    return prompts


def writer(network: Network, stop: str | None, max_new_tokens: int, sampling: Sampling, seed: int) -> Generate:
    mesh = one_device()
    return generator(
        network.model, network.params, network.tokenizer, stop=stops_of(network.tokenizer, stop), end="",
        max_new_tokens=max_new_tokens, buckets=BUCKETS, batch=8, sampling=sampling, key=jax.random.key(seed),
        reference=None, mesh=mesh,
    )  # fmt: skip


def compare(
    networks: Sequence[Network],
    prompts: Sequence[str],
    stop: str | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    out: TextIO | None = None,
) -> None:
    """Writes both models' replies to each prompt side by side, and their mean lengths."""
    out = out or sys.stdout
    answers = [writer(n, stop, max_new_tokens, sampling, seed)(prompts, range(len(prompts)), 0) for n in networks]
    width = min(shutil.get_terminal_size((100, 24)).columns, 160)
    column = (width - 3) // 2
    for prompt, *replies in zip(prompts, *answers, strict=True):
        texts = [reply.text.strip() if reply else "(the prompt is too long)" for reply in replies]
        out.write(f"\n{textwrap.fill(prompt, width)}\n{'-' * width}\n")
        sides = [[*itertools.chain(*(textwrap.wrap(line, column) or [""] for line in t.splitlines()))] for t in texts]
        for left, right in itertools.zip_longest(*sides, fillvalue=""):
            out.write(f"{left:<{column}} | {right}".rstrip() + "\n")
    means = [np.mean([reply.length for reply in side if reply]) if any(side) else 0.0 for side in answers]
    out.write(f"\nmean tokens: {means[0]:.1f} | {means[1]:.1f} over {len(prompts)} prompts\n")
