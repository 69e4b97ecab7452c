"""Saves: exact resume, what a torn or damaged save leaves, interrupts, and memory that the next steps take over."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.errors import UserError
from alignjax.training.checkpointing import Checkpointer, restore_tree, save_tree, uninterrupted
from alignjax.training.learn import init_state, make_learn

OPTIMIZER = optax.adam(0.1)


def loss(params, batch, key):
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.sum((params["w"] - batch.mean()) ** 2 + 0.1 * noise * params["w"]), {"w": params["w"].mean()}


def batches(start, stop):
    return (np.full((4,), step % 3, np.float32) for step in range(start, stop))


def fresh(average=False, anchor=False):
    return init_state({"w": jnp.arange(4.0)}, OPTIMIZER, jax.random.key(3), average, anchor=anchor)


def fit(state, start, stop, **options):
    """The state after the steps start <= step < stop."""
    learn = jax.jit(make_learn(loss, OPTIMIZER, **options))
    for batch in batches(start, stop):
        state, _ = learn(state, None, batch)
    return state


def newest(folder, like):
    saver = Checkpointer(folder)
    return saver.restore(like, saver.latest())


def same(a, b):
    keys = [jax.random.key_data(s.key) for s in (a, b)]
    np.testing.assert_array_equal(*keys)
    jax.tree.map(np.testing.assert_array_equal, {**vars(a), "key": 0}, {**vars(b), "key": 0})


def test_stopping_and_going_on_gives_the_same_bits(tmp_path):
    uninterrupted_state = fit(fresh(True), 0, 7, average_decay=0.9)
    interrupted = fit(fresh(True), 0, 3, average_decay=0.9)
    saver = Checkpointer(tmp_path / "c")
    saver.save(interrupted)
    saver.close()
    restored = newest(tmp_path / "c", fresh(True))
    same(restored, interrupted)
    same(fit(restored, int(restored.step), 7, average_decay=0.9), uninterrupted_state)


def test_stopping_at_a_half_point_and_going_on_gives_the_same_bits(tmp_path):
    want = fit(fresh(anchor=True), 0, 6, extragradient=True)
    interrupted = fit(fresh(anchor=True), 0, 3, extragradient=True)
    assert not np.array_equal(interrupted.anchor["w"], interrupted.params["w"])
    saver = Checkpointer(tmp_path / "c")
    saver.save(interrupted)
    saver.close()
    restored = newest(tmp_path / "c", fresh(anchor=True))
    same(restored, interrupted)
    same(fit(restored, 3, 6, extragradient=True), want)


def test_an_anchor_that_is_empty_is_not_in_a_save(tmp_path):
    """A save of a version that had no anchor is restored."""
    for name, anchor in (("c", False), ("d", True)):
        saver = Checkpointer(tmp_path / name)
        saver.save(fit(fresh(anchor=anchor), 0, 1))
        saver.close()
        files = [path for path in (tmp_path / name).rglob("*") if path.is_file()]
        assert any(b'"anchor"' in path.read_bytes() for path in files) == anchor
    assert newest(tmp_path / "c", fresh()).anchor == {}


def test_an_interrupt_waits_for_the_save_under_way(tmp_path):
    state, saved = fresh(), False
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background begins without it
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        saver = Checkpointer(tmp_path / "c")
        saver.save(state)
        saved = True
    assert saved and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    same(newest(tmp_path / "c", fresh()), state)


def test_a_restored_state_takes_the_place_of_the_first(tmp_path):
    saver = Checkpointer(tmp_path / "c")
    saver.save(fit(fresh(True), 0, 1))
    saver.close()
    like = fresh(True)
    assert newest(tmp_path / "c", like).step == 1
    assert like.params["w"].is_deleted() and like.average["w"].is_deleted()
    assert newest(tmp_path / "d", state := fresh()) is state and not state.params["w"].is_deleted()


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


def test_a_save_under_way_keeps_what_the_next_updates_take_over(tmp_path):
    """A state large enough that the save lasts, whose memory every update is given."""
    state = init_state({"w": jnp.arange(4e6)}, OPTIMIZER, jax.random.key(3), False)
    learn = jax.jit(make_learn(loss, OPTIMIZER), donate_argnums=0)
    want = jax.tree.map(np.array, {**vars(state), "key": 0})
    saver = Checkpointer(tmp_path / "c")
    saver.save(state)
    for batch in batches(0, 5):
        state, _ = learn(state, None, batch)
    jax.block_until_ready(state.params)
    saver.close()
    like = init_state({"w": jnp.zeros(4_000_000)}, OPTIMIZER, jax.random.key(3), False)
    got = newest(tmp_path / "c", like)
    jax.tree.map(np.testing.assert_array_equal, {**vars(got), "key": 0}, want)
