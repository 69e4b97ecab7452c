"""A quick look at any checkpoint: one prompt, streamed; or two checkpoints side by side."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.checkpoints import huggingface, weights
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.models.config import TransformerConfig
from alignjax.models.tokenizer import (
    Tokenizer,
    decode_continuation,
    encode_prompt,
    pad,
    stop_sequences,
    with_chat_template,
)
from alignjax.pipeline.experiment import load_network
from alignjax.pipeline.networks import Network
from alignjax.sampling.generate import Generate, Generator, ReplyFormat, reply_writer
from alignjax.sampling.process import Sampling, StopSequences, sample
from alignjax.tasks.task import one_message

BUCKETS = (32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)  # prompt lengths in tokens
_BATCH = 8
T = TypeVar("T")


class PreviewOptions(NamedTuple):
    """How a preview writes."""

    stop: str | None = None  # a text that ends a reply, beside the tokenizer's end tokens
    max_new_tokens: int = 128
    sampling: Sampling = Sampling()
    seed: int = 0


def one_device_mesh() -> jax.sharding.Mesh:
    """Returns the mesh of the first device."""
    return sharding.make_mesh(sharding.Mesh(data=1, fsdp=1, tensor=1), sharding.available_devices()[:1])


def open_preview_network(folder: Path, chat: bool) -> Network:
    """Opens a Hugging Face folder, or a finished stage WORKDIR/NAME, on one device. Raises UserError."""
    mesh = one_device_mesh()
    if (folder / "model.json").exists():
        network = load_network(folder, mesh)
    elif storage.is_bucket(folder):
        raise UserError(f"{folder} is no finished stage's; a Hugging Face folder must lie on this machine: copy it")
    else:
        config = huggingface.read_config(folder)
        model, tokenizer = build(config), huggingface.read_tokenizer(folder)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        places = sharding.shardings(shapes, sharding.matching_rules(model.rules, shapes), mesh)
        network = Network(folder.name, model, tokenizer, "", weights.read_params(folder, config, places))
    if not chat:
        return network
    return dataclasses.replace(network, tokenizer=with_chat_template(network.tokenizer, one_message))


def stream(network: Network, prompt: str, options: PreviewOptions, out: TextIO | None = None) -> None:
    """Writes what the model says after the prompt, token by token, as it is drawn.

    Raises UserError when the prompt is empty or does not fit, and where log-probs are not finite; and what writing
    raises, such as BrokenPipeError.
    """
    tokenizer, out, new_tokens = network.tokenizer, out or sys.stdout, options.max_new_tokens
    ids, stops = encode_prompt(tokenizer, prompt), preview_stops(tokenizer, options.stop)
    failures: list[OSError] = []
    write_token = token_writer(tokenizer, {sequence[0] for sequence in stops if len(sequence) == 1}, out)

    def write_finite(token: np.ndarray, finite: np.ndarray) -> None:
        try:
            if finite:
                write_token(token)
        except OSError as error:  # it ends the program, which then raises an error of its own
            failures.append(error)
            raise

    def run(params: Any, prompt: Any, key: jax.Array) -> jax.Array:
        process = network.model.prefill(params, prompt, new_tokens)
        finite = jnp.all(jnp.isfinite(process.logits))

        def step(carry: Any, token: Any) -> Any:
            jax.debug.callback(write_finite, token[0], finite, ordered=True)
            return process.step(carry, token)

        drawn = sample(process._replace(step=step), key[None], new_tokens, stops, options.sampling)
        return jnp.all(jnp.isfinite(drawn.logp))

    padded = pad([ids], preview_length(network, len(ids), new_tokens))
    try:
        finite = interruptible(lambda: jax.jit(run)(network.params, padded, jax.random.key(options.seed)))
    except jax.errors.JaxRuntimeError:
        if failures:
            raise failures[0] from None
        raise
    out.write("\n")
    if not finite:
        raise UserError(f"{network.stage} gives log-probs that are not finite; its parameters are damaged")


def interruptible(compute: Callable[[], T]) -> T:
    """Returns compute() with all its effects done. A signal is answered at once: another thread waits for JAX.

    JAX does not log an error of a callback, which ends the computation; it is the caller's to report.
    """
    logger = logging.getLogger("jax._src.debugging")
    logger.disabled = True
    try:
        with ThreadPoolExecutor(1) as thread:
            result = thread.submit(lambda: jax.block_until_ready(compute())).result()
            thread.submit(jax.effects_barrier).result()
        return result
    finally:
        logger.disabled = False


def preview_length(network: Network, tokens: int, new_tokens: int) -> int:
    """Returns the length that a prompt of ``tokens`` tokens is padded to. Raises UserError when none fits."""
    fitting = [bucket for bucket in BUCKETS if bucket >= tokens]
    if not fitting:
        raise UserError(f"the prompt has {tokens} tokens, and the longest is {BUCKETS[-1]}; shorten it")
    config, length = network.model.config, min(fitting)
    warn_of_context(network, tokens, new_tokens)
    if isinstance(config, TransformerConfig) and config.positions == "learned":  # a bucket may exceed the positions
        return max(min(length, config.context - new_tokens), tokens)
    return length


def warn_of_context(network: Network, tokens: int, new_tokens: int) -> None:
    """Warns where a prompt of ``tokens`` tokens and its reply exceed the context that the network was trained on."""
    config = network.model.config
    if isinstance(config, TransformerConfig) and config.context < tokens + new_tokens:
        warnings.warn(f"{tokens} tokens and {new_tokens} new ones exceed the {config.context} tokens of context that "
                      f"{network.stage} was trained on; expect worse text", stacklevel=2)  # fmt: skip


def preview_stops(tokenizer: Tokenizer, stop: str | None) -> StopSequences:
    """Returns the tokenizer's end tokens, and the sequences of a text that ends a reply too."""
    ends = tuple((end,) for end in tokenizer.end_tokens)
    if not ends and stop is None:
        warnings.warn("the tokenizer has no end token, so a reply ends at the limit; give --stop", stacklevel=2)
    return (*ends, *(stop_sequences(tokenizer, stop) if stop is not None else ()))


def token_writer(tokenizer: Tokenizer, end_tokens: set[int], out: TextIO) -> Callable[[np.ndarray], None]:
    """Returns a function that writes the text which a token completes.

    It writes nothing from the first end token on, and no half character.
    """
    ids: list[int] = []
    written = [0]  # characters

    def write_token(token: np.ndarray) -> None:
        if ids and ids[-1] in end_tokens:
            return
        ids.append(int(token))
        if ids[-1] in end_tokens:
            return
        text = decode_continuation(tokenizer, ids)
        if not text.endswith("\ufffd"):
            out.write(text[written[0] :])
            out.flush()
            written[0] = len(text)

    return write_token


def preview_generator(network: Network, options: PreviewOptions) -> Generate:
    """Returns text in, text out by the network on one device."""
    mesh, stops = one_device_mesh(), preview_stops(network.tokenizer, options.stop)
    write = reply_writer(network.model, stops, options.max_new_tokens, options.sampling, mesh)
    return Generator(
        write, network.params, network.tokenizer, ReplyFormat(stops, ""), buckets=BUCKETS, batch=_BATCH,
        key=jax.random.key(options.seed), mesh=mesh, score=None, owner=network.stage,
    )  # fmt: skip


def compare(
    networks: Sequence[Network], prompts: Sequence[str], options: PreviewOptions, out: TextIO | None = None
) -> None:
    """Writes both models' replies to each prompt side by side, and their mean lengths."""
    out = out or sys.stdout
    for network in networks:
        lengths = [len(encode_prompt(network.tokenizer, prompt)) for prompt in prompts]
        warn_of_context(network, max((n for n in lengths if n <= BUCKETS[-1]), default=0), options.max_new_tokens)
    replies = [preview_generator(network, options)(prompts, range(len(prompts)), 0) for network in networks]
    width = min(shutil.get_terminal_size((100, 24)).columns, 160)
    column = (width - 3) // 2
    for prompt, *pair in zip(prompts, *replies, strict=True):
        texts = [reply.text.strip() if reply else "(the prompt is too long)" for reply in pair]
        out.write(f"\n{textwrap.fill(prompt, width)}\n{'-' * width}\n")
        sides = [[*itertools.chain(*(textwrap.wrap(line, column) or [""] for line in t.splitlines()))] for t in texts]
        for left, right in itertools.zip_longest(*sides, fillvalue=""):
            out.write(f"{left:<{column}} | {right}".rstrip() + "\n")
    means = [np.mean([reply.length for reply in side if reply]) if any(side) else 0.0 for side in replies]
    out.write(f"\nmean tokens: {means[0]:.1f} | {means[1]:.1f} over {len(prompts)} prompts\n")
