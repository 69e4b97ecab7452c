"""How fast exact games run: one compiled call against a plain NumPy loop, and against the matrix product alone.

    python experiments/benchmarks/games.py

It prints two comparisons in float32 on this machine. (1) 100 games of 100 actions for 10,000 Nash-MD steps: one call of
``play``, without its compilation, against the same loop in NumPy on all games at once. (2) 5,000 actions for 1,000
steps against 1,000 products of the matrix with a vector by NumPy's BLAS. These read the same bytes, so they are the
floor.
"""

import platform
import time

import jax
import numpy as np

from alignjax.games import dynamics, game, zoo

TAU = 0.1


def numpy_nash_md(p: np.ndarray, log_mu: np.ndarray, steps: int) -> np.ndarray:
    """Returns the last log policies [games, Y] of the same dynamic on p [games, Y, Y], as a plain NumPy loop."""
    policy = log_mu
    for t in range(steps):
        h = np.float32(2 / (TAU * (t + 2)))
        mixed = log_softmax((1 - h * np.float32(TAU)) * policy + h * np.float32(TAU) * log_mu)
        policy = log_softmax(mixed + h * (p @ np.exp(mixed)[..., None])[..., 0])
    return policy


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Returns log softmax over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def games(count: int, actions: int) -> game.Game:
    """Returns a batch of one-context games in float32."""
    p, mu = zoo.mixed(0, count, actions), zoo.random_reference(1, count, actions)
    batch = dynamics.stack([game.from_matrix(*one, TAU) for one in zip(p, mu, strict=True)])
    return jax.tree.map(lambda x: np.asarray(x, np.float32), batch)


def seconds(function, *arguments) -> tuple[float, np.ndarray]:
    """Returns how long a call takes, and its result."""
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun, result


def compiled(batch: game.Game, steps: int):
    """Returns one call of ``play``, compiled ahead of time, so that compilation is not measured."""
    run = jax.jit(
        lambda g: dynamics.play(dynamics.nash_md(dynamics.theorem_1), g, g.log_mu, (steps,)).policy[:, 0, 0, 0]
    )
    return run.lower(batch).compile()


def main() -> None:
    """Prints the comparisons."""
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for count, actions, steps in ((100, 100, 10_000), (1, 5000, 1000)):
        batch = games(count, actions)
        ours, policy = seconds(compiled(batch, steps), batch)
        p, log_mu = np.asarray(batch.p[:, 0]), np.asarray(batch.log_mu[:, 0])
        theirs, want = seconds(numpy_nash_md, p, log_mu, steps)
        apart = abs(np.exp(policy) - np.exp(want)).max()
        vectors = np.exp(log_mu)[..., None]
        floor, _ = seconds(lambda p=p, v=vectors, n=steps: [p @ v for _ in range(n)][-1])
        print(
            f"{count} games x {actions} actions x {steps} steps: compiled {ours:.2f} s, NumPy loop {theirs:.2f} s "
            f"({theirs / ours:.2f} times ours), matrix products alone {floor:.2f} s "
            f"(ours is {ours / floor:.2f} times that); largest difference {apart:.0e}"
        )


if __name__ == "__main__":
    main()
