"""Updates and saves: keys by step, moving averages, exact resume, and what a torn save leaves."""

import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.errors import UserError
from alignjax.training import learn as train
from alignjax.training.checkpointing import Checkpointer, restore_tree, save_tree, uninterrupted
from alignjax.training.metrics import MetricsWriter, read_metrics

OPTIMIZER = optax.adam(0.1)


def objective(params, batch, key):
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.sum((params["w"] - batch.mean()) ** 2 + 0.1 * noise * params["w"]), {"w": params["w"].mean()}


def data(start, stop):
    return (np.full((4,), step % 3, np.float32) for step in range(start, stop))


def fresh(average=False):
    return train.init({"w": jnp.arange(4.0)}, OPTIMIZER, jax.random.key(3), average)


def fit(state, start, stop, seen=lambda *_: None, **options):
    update = jax.jit(train.make_update(objective, OPTIMIZER, **options))
    return train.fit(state, start, None, data(start, stop), update, seen)


def newest(folder, like):
    saver = Checkpointer(folder)
    return saver.restore(like, saver.latest())


def same(a, b):
    keys = [jax.random.key_data(s.key) for s in (a, b)]
    np.testing.assert_array_equal(*keys)
    jax.tree.map(np.testing.assert_array_equal, {**vars(a), "key": 0}, {**vars(b), "key": 0})


def test_stopping_and_going_on_gives_the_same_bits(tmp_path):
    whole = fit(fresh(True), 0, 7, average_decay=0.9)
    half = fit(fresh(True), 0, 3, average_decay=0.9)
    saver = Checkpointer(tmp_path / "c")
    saver.save(half)
    saver.close()
    again = newest(tmp_path / "c", fresh(True))
    same(again, half)
    same(fit(again, int(again.step), 7, average_decay=0.9), whole)


def test_an_interrupt_waits_for_the_save_under_way(tmp_path):
    state, ended = fresh(), False
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background begins without it
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        saver = Checkpointer(tmp_path / "c")
        saver.save(state)
        ended = True
    assert ended and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    same(newest(tmp_path / "c", fresh()), state)


def test_an_array_in_several_places_is_one_argument():
    x, y = jnp.arange(3.0), jnp.ones(2)
    tree = {"base": {"w": x}, "reference": {"w": x, "b": y}, "none": None}
    once = train.Once(tree)
    assert len(jax.tree.leaves(once)) == 2
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"frozen": once})]
    assert names == ["['frozen'].base.w", "['frozen'].reference.b"]
    jax.tree.map(np.testing.assert_array_equal, once.tree(), tree)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda once: once.tree())(once), tree)


def test_a_restored_state_takes_the_place_of_the_first(tmp_path):
    saver = Checkpointer(tmp_path / "c")
    saver.save(fit(fresh(True), 0, 1))
    saver.close()
    like = fresh(True)
    assert newest(tmp_path / "c", like).step == 1
    assert like.params["w"].is_deleted() and like.average["w"].is_deleted()
    assert newest(tmp_path / "d", state := fresh()) is state and not state.params["w"].is_deleted()


def test_the_root_key_never_moves_and_each_step_has_its_own():
    seen = []
    state = fit(fresh(), 0, 3, lambda s, step, m: seen.append((int(s.step), step)))
    np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(fresh().key))
    assert seen == [(1, 1), (2, 2), (3, 3)]
    noise = [jax.random.normal(jax.random.fold_in(jax.random.key(3), i), (4,)) for i in range(2)]
    assert np.abs(noise[0] - noise[1]).max() > 0.1


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_average_is_the_exponential_one(decay):
    """decay 0 follows the parameters (self-play), 1 stays at the start (the frozen reference)."""
    passed = [fresh(True).params["w"]]
    state = fit(fresh(True), 0, 4, lambda s, *_: passed.append(s.params["w"]), average_decay=decay)
    want = passed[0]
    for w in passed[1:]:
        want = decay * want + (1 - decay) * w
    np.testing.assert_allclose(state.average["w"], want, rtol=1e-6)


def test_collect_sees_its_own_key_and_the_frozen_trees():
    def collect(params, average, frozen, batch, key):
        return batch * 0 + frozen + jax.random.uniform(key)

    update = train.make_update(lambda p, b, k: (jnp.sum(p["w"] * 0), {"seen": b.mean()}), OPTIMIZER, collect)
    state = fresh()
    told = [update(state, 5.0, np.ones(4, np.float32))[1]["seen"] for _ in range(2)]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 0), 0)
    np.testing.assert_allclose(told, 5.0 + jax.random.uniform(key), rtol=1e-6)


def test_only_the_newest_saves_are_kept(tmp_path):
    saver = Checkpointer(tmp_path / "c")
    state = fresh()
    for step in range(4):
        state = fit(state, step, step + 1)
        saver.save(state)
    saver.close()
    assert sorted(int(p.name) for p in (tmp_path / "c").iterdir() if p.name.isdigit()) == [3, 4]


def test_a_half_written_save_is_not_taken(tmp_path):
    """What a kill in the middle of a save leaves: a folder that was never given its final name."""
    saver = Checkpointer(tmp_path / "c")
    first = fit(fresh(), 0, 1)
    saver.save(first)
    saver.close()
    torn = tmp_path / "c" / "2.orbax-checkpoint-tmp"
    torn.mkdir()
    (torn / "part").write_text("half")
    same(newest(tmp_path / "c", fresh()), first)


def test_a_damaged_save_is_named(tmp_path):
    saver = Checkpointer(tmp_path / "c")
    saver.save(fit(fresh(), 0, 1))
    saver.close()
    for path in (tmp_path / "c" / "1").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(UserError, match="is damaged"):
        newest(tmp_path / "c", fresh())


def test_trees_round_trip_and_a_missing_one_is_named(tmp_path):
    tree = {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.int32(4)}
    save_tree(tmp_path / "t", tree)
    where = jax.tree.map(lambda x: x.sharding, tree)
    jax.tree.map(np.testing.assert_array_equal, restore_tree(tmp_path / "t", tree, where), tree)
    with pytest.raises(UserError, match="nothing"):
        restore_tree(tmp_path / "nothing", tree, where)


class FakeWandb:
    """Records what a Weights & Biases run would be told."""

    def __init__(self):
        self.told = []

    def init(self, **words):
        self.told.append(words["id"])
        return self

    def log(self, row, step):
        self.told.append((step, row))

    def finish(self):
        self.told.append("finished")


def test_a_named_project_is_told_what_the_file_is_told(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_path / "run" / "stage", resume_step=0, project="mine")
    writer.write(0, {"loss": 1.5})
    writer.close()
    assert fake.told == ["run-stage", (0, {"loss": 1.5}), "finished"]
    assert read_metrics(tmp_path / "run" / "stage" / "metrics.jsonl") == [{"step": 0, "loss": 1.5}]


def test_a_project_without_the_library_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"alignjax\[wandb\]"):
        MetricsWriter(tmp_path / "stage", resume_step=0, project="mine")


def test_a_save_under_way_keeps_what_the_next_updates_take_over(tmp_path):
    """A state large enough that the save lasts, whose memory every update is given."""
    state = train.init({"w": jnp.arange(4e6)}, OPTIMIZER, jax.random.key(3), False)
    update = jax.jit(train.make_update(objective, OPTIMIZER), donate_argnums=0)
    want = jax.tree.map(np.array, {**vars(state), "key": 0})
    saver = Checkpointer(tmp_path / "c")
    saver.save(state)
    for batch in data(0, 5):
        state, _ = update(state, None, batch)
    jax.block_until_ready(state.params)
    saver.close()
    like = train.init({"w": jnp.zeros(4_000_000)}, OPTIMIZER, jax.random.key(3), False)
    got = newest(tmp_path / "c", like)
    jax.tree.map(np.testing.assert_array_equal, {**vars(got), "key": 0}, want)
