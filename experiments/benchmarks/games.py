"""How fast exact games run: one compiled call against a plain NumPy loop, and against the matrix product alone.

    python experiments/benchmarks/games.py

Prints, for float32 on this machine: (1) 100 games of 100 actions for 10,000 Nash-MD steps in one call of
``simulate``, without compilation, against the same loop in NumPy on all games at once; (2) 5,000 actions for 1,000
steps against 1,000 products of the matrix with a vector by NumPy's BLAS, which read the same bytes: the lower bound.
"""

import platform
import time

import jax
import numpy as np

from alignjax.games import dynamics, game, simulation, zoo

TAU = 0.1


def numpy_nash_md(p: np.ndarray, log_mu: np.ndarray, steps: int) -> np.ndarray:
    """Runs the same dynamic in plain NumPy on P [games, Y, Y]; returns log-policies [games, Y]."""
    policy = log_mu
    for t in range(steps):
        h = np.float32(2 / (TAU * (t + 2)))
        mixed = log_softmax((1 - h * np.float32(TAU)) * policy + h * np.float32(TAU) * log_mu)
        policy = log_softmax(mixed + h * (p @ np.exp(mixed)[..., None])[..., 0])
    return policy


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Returns log softmax along the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def random_games(count: int, actions: int) -> game.Game:
    """Returns a batch of random games of one context, in float32."""
    p, mu = zoo.unstructured(0, count, actions), zoo.random_reference(1, count, actions)
    batch = simulation.stack_games([game.from_matrix(*arrays, TAU) for arrays in zip(p, mu, strict=True)])
    return jax.tree.map(lambda x: np.asarray(x, np.float32), batch)


def seconds(function, *arguments) -> tuple[float, np.ndarray]:
    """Returns the wall-clock seconds of a call, and its result."""
    begun = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    return time.perf_counter() - begun, result


def compile_nash_md(batch: game.Game, steps: int):
    """Returns one call of ``simulate``, compiled ahead of time, so that compilation is not measured."""
    run = jax.jit(
        lambda g: simulation.simulate(
            dynamics.exact_nash_md(dynamics.theorem_1_step_size), g, g.log_mu, (steps,)
        ).policy[:, 0, 0, 0]
    )
    return run.lower(batch).compile()


def main() -> None:
    """Prints both measurements."""
    print(f"{platform.processor() or platform.machine()}, {jax.devices()[0].device_kind}, JAX {jax.__version__}")
    for count, actions, steps in ((100, 100, 10_000), (1, 5000, 1000)):
        batch = random_games(count, actions)
        compiled, policy = seconds(compile_nash_md(batch, steps), batch)
        p, log_mu = np.asarray(batch.p[:, 0]), np.asarray(batch.log_mu[:, 0])
        loop, expected = seconds(numpy_nash_md, p, log_mu, steps)
        difference = abs(np.exp(policy) - np.exp(expected)).max()
        vectors = np.exp(log_mu)[..., None]
        floor, _ = seconds(lambda p=p, v=vectors, n=steps: [p @ v for _ in range(n)][-1])
        print(
            f"{count} games x {actions} actions x {steps} steps: compiled {compiled:.2f} s, NumPy loop {loop:.2f} s "
            f"({loop / compiled:.2f} times the compiled), matrix products alone {floor:.2f} s "
            f"(compiled is {compiled / floor:.2f} times that); largest difference {difference:.0e}"
        )


if __name__ == "__main__":
    main()
