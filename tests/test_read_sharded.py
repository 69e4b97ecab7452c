"""Shards of a checkpoint on a mesh: each is the part of the whole, and every byte is read once."""

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from alignjax.checkpoints import folders, weights
from alignjax.checkpoints.families import FAMILIES, tensor_entries
from alignjax.distributed import sharding
from alignjax.models.build import build
from tests.conftest import TINY

BIASED = dict(norm="layer", gated=False, kv_heads=4, biases=("q", "k", "v", "o", "up", "down"))


@pytest.mark.parametrize("axes", [(1, 4, 2), (1, 1, 8), (8, 1, 1)])
@pytest.mark.parametrize(
    "changes", [{}, {"family": "gpt2", "positions": "learned", **BIASED}, {"family": "gpt_neox", **BIASED}]
)
def test_every_shard_is_read_once_and_equals_its_part_of_the_whole(tmp_path, monkeypatch, changes, axes):
    """On every mesh and in every dtype, also of fused tensors and where a shard cuts through a head."""
    config = dataclasses.replace(TINY, **changes)
    shapes, rng = weights.abstract_params(config), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    entries = tensor_entries(FAMILIES[config.family], config, leaves)
    folders.write_tensors(tmp_path, weights.checkpoint_tensors(entries, leaves, config), 10**9)
    mesh = sharding.make_mesh(sharding.Mesh(*axes))
    shardings = sharding.shardings(shapes, sharding.matching_rules(build(config).rules, shapes), mesh)
    blocks, read_block = [], weights.read_block
    monkeypatch.setattr(weights, "read_block", lambda *a: blocks.append(read_block(*a)) or blocks[-1])
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        blocks.clear()
        params_read = weights.read_params(tmp_path, config, shardings, dtype)
        assert jax.tree.map(lambda x: x.sharding, params_read) == shardings
        jax.tree.map(lambda x, y, d=dtype: np.testing.assert_array_equal(x, y.astype(d)), params_read, params)
        assert sum(x.size for x in blocks) == sum(x.size for x in jax.tree.leaves(params))
