"""Eight emulated devices, float32 matmuls, no network; small compiled fixtures shared by the tests."""

import contextlib
import gc
import os
import shutil
import tempfile
from pathlib import Path

from tests import QUICK

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK}"
os.environ["HF_HUB_OFFLINE"] = "1"
# The processes of one test run share compiled programs. The folder is empty at the start and deleted at the end.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="alignjax-tests-"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest

from alignjax.models.decoder import TransformerConfig, decoder
from alignjax.types import Tokens

jax.config.update("jax_numpy_rank_promotion", "raise")

ROOT = Path(__file__).parents[1]
TINY = TransformerConfig(vocab_size=24, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24)


@pytest.fixture(scope="session")
def model():
    """The tiny decoder, its functions compiled: tests call them many times."""
    plain = decoder(TINY)
    return plain._replace(
        init=jax.jit(plain.init),
        forward=jax.jit(plain.forward),
        completion_states=jax.jit(plain.completion_states),
        last_state=jax.jit(plain.last_state),
        logits=jax.jit(plain.logits),
    )


@pytest.fixture(scope="session")
def params(model):
    """Parameters of ``model``, scaled up so that every path through the network changes its result."""
    return jax.tree.map(lambda x: x * 1.5, model.init(jax.random.key(0)))


@pytest.fixture(scope="session")
def other_params(model):
    """As ``params``, from another key."""
    return jax.tree.map(lambda x: x * 1.5, model.init(jax.random.key(1)))


@pytest.fixture
def prompt():
    """Four prompts of 2 to 5 tokens, right-padded."""
    return ragged([[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10, 11, 12, 13]])


def pytest_unconfigure():
    """Deletes the folder of compiled programs, once, in the process that created it."""
    if "PYTEST_XDIST_WORKER" not in os.environ and "alignjax-tests-" in os.environ["JAX_COMPILATION_CACHE_DIR"]:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


_LONGEST = ("test_quickstart.py", "test_hosts.py", "test_rlcd_study.py")


def pytest_collection_modifyitems(items):
    """Puts the slowest files first, so that parallel processes end at the same time."""
    items.sort(key=lambda item: item.path.name not in _LONGEST)


def pytest_collection_finish():
    """Spares the garbage collector what is imported, which stays; tracing makes and drops many objects at once."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="session")
def environment():
    """Returns (devices) -> the environment of a subprocess with that many emulated devices."""

    def make(devices=1):
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        }

    return make


@contextlib.contextmanager
def compilations():
    """Yields a list that receives the duration, in seconds, of every compilation inside the context."""
    durations = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def ragged(rows, length=None, side="right", filler=0):
    """Returns rows of ids as Tokens [B, length], padded on ``side`` with the token ``filler``."""
    length = length or max(map(len, rows))
    tokens, mask = np.full((len(rows), length), filler, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        columns = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        tokens[i, columns], mask[i, columns] = row, True
    return Tokens(tokens, mask)
