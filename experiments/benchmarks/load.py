"""Time and memory of reading a checkpoint, beyond the parameters, against transformers' own reader.

    python experiments/benchmarks/load.py [--parameters 1e9] [--stored bfloat16] [--dtype bfloat16] [--folder F]

Writes a random Llama checkpoint: a file for each layer and an index, in a temporary folder or in F, where it is kept
and used again. Then reads it in two separate processes: with ``read_params`` onto eight emulated devices, fsdp=4 and
tensor=2, and, when PyTorch is installed, with transformers' ``from_pretrained`` into the same dtype, touching every
page of its parameters. Memory is sampled every 2 ms; reported is the peak minus what the process had after its imports
and minus the parameters. Anonymous memory is what the kernel cannot take back. Resident memory also counts the pages of
mapped files, which it can. A figure below zero means that the parameters are those pages, as PyTorch does when the
dtype is the file's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def sizes(parameters: float) -> dict[str, int]:
    """Returns the sizes in config.json of a Llama with about this number of parameters; 1e9 gives 1.01e9."""
    scale = (parameters / 1e9) ** (1 / 3)
    heads = max(4 * round(8 * scale), 4)
    return {
        "vocab_size": max(512 * round(62.5 * scale), 512), "hidden_size": 64 * heads, "num_attention_heads": heads,
        "num_key_value_heads": 4, "intermediate_size": 176 * heads, "num_hidden_layers": max(round(20 * scale), 2),
    }  # fmt: skip


def write_checkpoint(folder: Path, parameters: float, dtype: str) -> None:
    """Writes a random checkpoint, layer by layer."""
    c, rng, index = sizes(parameters), np.random.default_rng(0), {}
    width, mlp, kv = c["hidden_size"], c["intermediate_size"], 64 * c["num_key_value_heads"]
    (folder / "config.json").write_text(json.dumps({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, **c,
    }))  # fmt: skip

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        """Writes one file of normal tensors with standard deviation .02."""
        values = {n: (0.02 * rng.standard_normal(s, np.float32)).astype(DTYPES[dtype]) for n, s in shapes.items()}
        safetensors.numpy.save_file(values, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(values, file))

    outer = {"model.embed_tokens.weight": (c["vocab_size"], width), "lm_head.weight": (c["vocab_size"], width)}
    save("model-outer.safetensors", {**outer, "model.norm.weight": (width,)})
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (kv, width), "self_attn.v_proj": (kv, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (mlp, width), "mlp.up_proj": (mlp, width),
            "mlp.down_proj": (width, mlp),
        }  # fmt: skip
        save(f"model-{i}.safetensors", {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def alignjax_reader(folder: Path, dtype: str) -> Callable[[], int]:
    """Returns a function that reads the checkpoint and returns its bytes; all imports are done before."""
    import jax

    from alignjax.checkpoints import huggingface, weights
    from alignjax.distributed import sharding
    from alignjax.models.build import build

    config = huggingface.read_config(folder)
    shapes, rules = weights.abstract_params(config), build(config).rules
    mesh = sharding.make_mesh(sharding.Mesh(data=1, fsdp=4, tensor=2))
    shardings = sharding.shardings(shapes, sharding.matching_rules(rules, shapes), mesh)
    jax.block_until_ready(jax.device_put(np.zeros(8), sharding.replicated(mesh)))

    def read() -> int:
        """Reads the checkpoint; returns its bytes."""
        params = jax.block_until_ready(weights.read_params(folder, config, shardings, DTYPES[dtype]))
        return sum(leaf.nbytes for leaf in jax.tree.leaves(params))

    return read


def transformers_reader(folder: Path, dtype: str) -> Callable[[], int]:
    """Returns a function that reads the checkpoint and returns its bytes; all imports are done before."""
    import torch
    import transformers
    from transformers.models.llama import modeling_llama

    assert modeling_llama and torch.zeros(8).sum() == 0
    transformers.utils.logging.disable_progress_bar()

    def read() -> int:
        """Reads the checkpoint; returns its bytes."""
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True
        )
        for p in model.parameters():
            p.detach().flatten()[:: 4096 // p.element_size()].sum()  # a value of every page
        return sum(p.numel() * p.element_size() for p in model.parameters())

    return read


READERS = {"alignjax": alignjax_reader, "transformers": transformers_reader}


def memory_of(pid: int) -> dict[str, int]:
    """Returns the resident bytes of a process and the anonymous ones among them; {} when it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    fields = dict(line.split(":", 1) for line in lines)
    return {key: 1024 * int(fields[key].split()[0]) for key in ("VmRSS", "RssAnon") if key in fields}


def read_and_report(reader: str, folder: Path, dtype: str) -> None:
    """Reads the checkpoint in this process; prints seconds, bytes, and the memory held before as JSON."""
    read = READERS[reader](folder, dtype)
    baseline, begun = memory_of(os.getpid()), time.perf_counter()
    size = read()
    print(json.dumps({"seconds": time.perf_counter() - begun, "bytes": size, "baseline": baseline}))


def measure(reader: str, folder: Path, dtype: str) -> dict[str, float]:
    """Returns the seconds of a reader in a process of its own, and its peak bytes of memory beyond the parameters."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, __file__, "--reader", reader, "--folder", str(folder), "--dtype", dtype]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **flags})
    peak = {"VmRSS": 0, "RssAnon": 0}
    while process.poll() is None:
        peak = {key: max(peak[key], value) for key, value in memory_of(process.pid).items()} or peak
        time.sleep(0.002)
    if process.returncode:
        raise SystemExit(f"{reader} ended with status {process.returncode}")
    report = json.loads(process.stdout.read().splitlines()[-1])
    return report | {key: peak[key] - report["baseline"][key] - report["bytes"] for key in peak}


def machine() -> str:
    """Returns the processor, cores, memory and versions on one line."""
    names = [n for n in ("jax", "numpy", "safetensors", "transformers", "torch") if importlib.util.find_spec(n)]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB; {versions}"


def main() -> None:
    """Measures both readers and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--stored", choices=DTYPES, default="bfloat16", help="the file's dtype")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="that of the parameters read")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--reader", choices=READERS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.reader:
        return read_and_report(arguments.reader, arguments.folder, arguments.dtype)
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "model.safetensors.index.json").exists():
            write_checkpoint(folder, arguments.parameters, arguments.stored)
        results = {"alignjax": measure("alignjax", folder, arguments.dtype)}
        if importlib.util.find_spec("torch"):
            results["transformers"] = measure("transformers", folder, arguments.dtype)
    for name, r in results.items():
        count = r["bytes"] / np.dtype(DTYPES[arguments.dtype]).itemsize
        print(
            f"{name}: {count / 1e9:.3f}e9 parameters of {arguments.dtype} in {r['seconds']:.2f} s; beyond the "
            f"{r['bytes'] / 1e6:.0f} MB held, at most {r['RssAnon'] / 1e6:.0f} MB of anonymous memory "
            f"({r['RssAnon'] / r['bytes']:.3f} of it), {r['VmRSS'] / 1e6:.0f} MB resident with the mapped files"
        )
    if len(results) == 2:
        ratio = results["transformers"]["seconds"] / results["alignjax"]["seconds"]
        print(f"transformers takes {ratio:.2f} times the seconds of alignjax")


if __name__ == "__main__":
    main()
