import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from alignjax.checkpoints import weights
from alignjax.checkpoints.families import FAMILIES, entries
from alignjax.distributed import sharding
from alignjax.models.build import build
from tests.conftest import TINY

BIASED = dict(norm="layer", gated=False, kv_heads=4, biases=("q", "k", "v", "o", "up", "down"))


@pytest.mark.parametrize("axes", [(1, 4, 2), (1, 1, 8), (8, 1, 1)])
@pytest.mark.parametrize(
    "changes", [{}, {"family": "gpt2", "positions": "learned", **BIASED}, {"family": "gpt_neox", **BIASED}]
)
def test_a_shard_is_the_whole_s_part_read_once(tmp_path, monkeypatch, changes, axes):
    """Fused tensors too, and heads that a shard cuts through; on every mesh, in every dtype."""
    config = dataclasses.replace(TINY, **changes)
    shapes, rng = weights.parameter_shapes(config), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    weights.write_tensors(
        tmp_path, weights.their_tensors(entries(FAMILIES[config.family], config, leaves), leaves, config), 10**9
    )
    mesh = sharding.make_mesh(sharding.Mesh(*axes))
    where = sharding.shardings(shapes, sharding.live(build(config).rules, shapes), mesh)
    read, plain = [], weights.read_piece
    monkeypatch.setattr(weights, "read_piece", lambda *a: read.append(plain(*a)) or read[-1])
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        read.clear()
        found = weights.read_params(tmp_path, config, where, dtype)
        assert jax.tree.map(lambda x: x.sharding, found) == where
        jax.tree.map(lambda x, y, d=dtype: np.testing.assert_array_equal(x, y.astype(d)), found, params)
        assert sum(x.size for x in read) == sum(x.size for x in jax.tree.leaves(params))
