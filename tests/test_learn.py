"""Learning: keys by step, moving averages, epochs and minibatches, accumulated gradients, shared arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.training.learn import COLLECT, LEARN, UpdateSchedule, init_state, make_learn, step_key
from alignjax.training.shared_tree import SharedTree

OPTIMIZER = optax.adam(0.1)


def loss(params, batch, key):
    noise = jax.random.normal(key, params["w"].shape)
    return jnp.sum((params["w"] - batch.mean()) ** 2 + 0.1 * noise * params["w"]), {"w": params["w"].mean()}


def batches(start, stop):
    return [np.full((4,), step % 3, np.float32) for step in range(start, stop)]


def fresh(average=False):
    return init_state({"w": jnp.arange(4.0)}, OPTIMIZER, jax.random.key(3), average)


def states(state, count, **options):
    """The states before and after each of ``count`` steps."""
    learn, passed = jax.jit(make_learn(loss, OPTIMIZER, **options)), [state]
    for batch in batches(0, count):
        passed.append(learn(passed[-1], None, batch)[0])
    return passed


def test_the_root_key_never_moves_and_each_step_and_purpose_has_its_own():
    passed = states(fresh(), 3)
    root = jax.random.key_data(jax.random.key(3))
    assert [int(state.step) for state in passed] == [0, 1, 2, 3]
    assert all(np.array_equal(jax.random.key_data(state.key), root) for state in passed)
    keys = [step_key(state, purpose) for state in passed for purpose in (COLLECT, LEARN)]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 8
    want = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 2), COLLECT)
    np.testing.assert_array_equal(jax.random.key_data(step_key(passed[2], COLLECT)), jax.random.key_data(want))


def test_a_loss_gets_the_key_of_its_step_the_frozen_trees_and_the_batch():
    def record(params, batch, key):
        return jnp.sum(params["w"]) * 0, {"uniform": jax.random.uniform(key), "batch": batch.mean()}

    def assemble(params, frozen):
        return {"w": params["w"] + frozen}

    learn = make_learn(record, OPTIMIZER, assemble=assemble)
    state, batch = dataclasses.replace(fresh(), step=jnp.int32(5)), np.full(4, 2, np.float32)
    metrics = [learn(state, 5.0, batch)[1] for _ in range(2)]
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(3), 5), LEARN)
    np.testing.assert_allclose([m["uniform"] for m in metrics], jax.random.uniform(key))
    assert metrics[0]["batch"] == 2

    def of_sum(params, batch, key):
        return jnp.sum(params["w"] ** 2), {"w": params["w"]}

    _, metrics = make_learn(of_sum, OPTIMIZER, assemble=assemble)(fresh(), 5.0, batch)
    np.testing.assert_array_equal(metrics["w"], jnp.arange(4.0) + 5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.linalg.norm(2 * (np.arange(4.0) + 5)), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.75, 1.0])
def test_the_average_is_the_exponential_one(decay):
    """decay 0 follows the parameters (self-play), 1 stays at the start (the frozen reference)."""
    passed = states(fresh(True), 4, average_decay=decay)
    want = passed[0].params["w"]
    for state in passed[1:]:
        want = decay * want + (1 - decay) * state.params["w"]
    np.testing.assert_allclose(passed[-1].average["w"], want, rtol=1e-6)
    assert fresh(False).average == {} and states(fresh(False), 1)[-1].average == {}


# --- epochs and minibatches ---

ROWS = np.arange(8, dtype=np.float32)


def regression(params, batch, key):
    """The gradient of a row depends on the parameters, so that the order of the updates counts."""
    error = params["w"] * batch["x"] - batch["y"]
    noise = 0.01 * jax.random.normal(key) * params["w"]
    return jnp.mean(error**2) + noise, {"mean": jnp.mean(batch["x"])}


def test_two_epochs_of_two_minibatches_are_four_updates_by_hand():
    """Over the shuffles and keys of the epochs, and metrics are means over the first epoch."""
    batch = {"x": ROWS / 8, "y": np.cos(ROWS)}
    state = init_state({"w": jnp.float32(0.3)}, OPTIMIZER, jax.random.key(3), True)
    learn = jax.jit(make_learn(regression, OPTIMIZER, UpdateSchedule(epochs=2, minibatches=2), average_decay=0.5))
    after, metrics = learn(state, None, batch)

    key, params, opt_state, norms = step_key(state, LEARN), state.params, state.opt_state, []
    for epoch in range(2):
        order = jax.random.permutation(jax.random.fold_in(key, epoch), 8)
        for part in range(2):
            minibatch = jax.tree.map(lambda x, rows=order[4 * part : 4 * part + 4]: x[rows], batch)
            update_key = jax.random.fold_in(key, 2 + 2 * epoch + part)
            gradient = jax.grad(lambda p, b=minibatch, k=update_key: regression(p, b, k)[0])(params)
            updates, opt_state = OPTIMIZER.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
            norms.append(abs(gradient["w"]))

    np.testing.assert_allclose(after.params["w"], params["w"], rtol=1e-6)
    assert after.opt_state[0].count == 4 and after.step == 1
    np.testing.assert_allclose(after.opt_state[0].mu["w"], opt_state[0].mu["w"], rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], np.max(norms), rtol=1e-5)  # of all updates
    np.testing.assert_allclose(metrics["mean"], np.mean(batch["x"]), rtol=1e-6)
    np.testing.assert_allclose(after.average["w"], 0.5 * 0.3 + 0.5 * params["w"], rtol=1e-6)  # moved once


@pytest.mark.parametrize(("epochs", "minibatches"), [(2, 2), (1, 4), (3, 1)])
def test_each_epoch_uses_each_row_once_in_an_order_of_its_own(epochs, minibatches):
    """The parameters record the rows of every update: w counts updates, and row w of the table gets them."""
    schedule = UpdateSchedule(epochs, minibatches)
    size = len(ROWS) // minibatches

    def record(params, batch, key):
        number = jnp.int32(jax.lax.stop_gradient(params["w"]))
        return params["w"] + jnp.sum(params["table"][number] * batch), {}

    optimizer = optax.sgd(-1.0)  # params + gradient
    params = {"w": jnp.float32(0), "table": jnp.zeros((schedule.updates, size))}
    state = init_state(params, optimizer, jax.random.key(0), False)
    after, _ = jax.jit(make_learn(record, optimizer, schedule))(state, None, ROWS)
    assert after.params["w"] == schedule.updates == epochs * minibatches
    rows = np.asarray(after.params["table"]).reshape(epochs, -1)
    np.testing.assert_array_equal(np.sort(rows, 1), np.tile(ROWS, (epochs, 1)))
    assert len({tuple(row) for row in rows.tolist()}) == epochs
    again, _ = make_learn(record, optimizer, schedule)(dataclasses.replace(state, step=jnp.int32(1)), None, ROWS)
    assert not np.array_equal(again.params["table"], after.params["table"])


@pytest.mark.parametrize("schedule", [UpdateSchedule(accumulate=4), UpdateSchedule(2, 2, 2)])
def test_an_accumulated_gradient_is_that_of_all_its_rows(schedule):
    def noiseless(params, batch, key):
        return regression(params, batch, jax.random.key(0))

    batch = {"x": ROWS / 8, "y": np.cos(ROWS)}
    state = init_state({"w": jnp.float32(0.3)}, OPTIMIZER, jax.random.key(3), False)
    ends = [
        jax.jit(make_learn(noiseless, OPTIMIZER, s))(state, None, batch)
        for s in (schedule, dataclasses.replace(schedule, accumulate=1))
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *(metrics for _, metrics in ends))
    np.testing.assert_allclose(*(state.params["w"] for state, _ in ends), rtol=1e-6)


# --- extragradient steps ---


@pytest.mark.parametrize("schedule", [UpdateSchedule(), UpdateSchedule(epochs=2, minibatches=2)])
def test_the_second_of_two_batches_is_learned_from_where_the_first_was(schedule):
    """By hand: the optimiser's memory goes through both, the parameters of the half point through neither."""
    state = init_state({"w": jnp.float32(0.3)}, OPTIMIZER, jax.random.key(3), False, anchor=True)
    learn = jax.jit(make_learn(regression, OPTIMIZER, schedule, extragradient=True))
    plain = jax.jit(make_learn(regression, OPTIMIZER, schedule))
    passed, want = [state], [dataclasses.replace(state, anchor={})]
    for step in range(4):
        batch = {"x": ROWS / 8, "y": np.cos(ROWS + step)}
        passed.append(learn(passed[-1], None, batch)[0])
        start = want[step - step % 2].params  # of the pair
        want.append(plain(dataclasses.replace(want[-1], params=start), None, batch)[0])
    for got, state in zip(passed, want, strict=True):
        jax.tree.map(np.testing.assert_array_equal, (got.params, got.opt_state), (state.params, state.opt_state))
    assert passed[1].anchor["w"] == passed[2].anchor["w"] == passed[0].params["w"] != passed[2].params["w"]
    assert fresh().anchor == {}


# --- arguments ---


def test_an_array_in_several_places_is_one_argument():
    x, y = jnp.arange(3.0), jnp.ones(2)
    tree = {"base": {"w": x}, "reference": {"w": x, "b": y}, "none": None}
    shared = SharedTree(tree)
    assert len(jax.tree.leaves(shared)) == 2
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path({"frozen": shared})]
    assert names == ["['frozen'].base.w", "['frozen'].reference.b"]
    jax.tree.map(np.testing.assert_array_equal, shared.tree(), tree)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(lambda shared: shared.tree())(shared), tree)
