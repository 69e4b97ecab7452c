"""The bridge between token-level policies and games: enumerated worlds, both mixtures, the deep loss's gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.games import game as games
from alignjax.games import solve, text
from alignjax.models.log_probs import log_prob
from alignjax.objectives import PreferenceGradient
from alignjax.sampling.process import geometric_mixture
from alignjax.types import Completion, PreferenceBatch, Process, Prompt, Response
from tests.conftest import ragged
from tests.test_games import float64

__all__ = ["float64"]
EOS = 2
WORLD = text.completions(3, 3, EOS)
PROMPT = ragged([[0]])
PREFIXES = int(text.prefixes(WORLD).max()) + 1


def table(seed):
    return {"logits": jax.random.normal(jax.random.key(seed), (PREFIXES, 3))}


def policy(params):
    return text.sequences(text.tabular(WORLD), params, PROMPT, WORLD)


def test_completions_are_all_that_end_with_eos_or_at_the_limit():
    rows = [tuple(t[m].tolist()) for t, m in zip(WORLD.tokens, WORLD.mask, strict=True)]
    assert len(rows) == len(set(rows)) == 1 + 2 + 4 * 3 and rows == sorted(rows)
    assert all((row[-1] == EOS or len(row) == 3) and EOS not in row[:-1] for row in rows)
    assert PREFIXES == 1 + 2 + 4
    assert len(text.completions(4, 2, 0).tokens) == 1 + 3 * 4


def test_a_tabular_policy_is_a_distribution_whose_next_tokens_are_its_table():
    logp = policy(table(0))
    assert float(jnp.exp(logp).sum()) == pytest.approx(1, abs=1e-14)
    got = text.next_tokens(WORLD, logp, 3)[0]
    np.testing.assert_allclose(got, jax.nn.log_softmax(table(0)["logits"]), atol=1e-12)


def test_a_decoder_is_a_policy_over_the_world(model, params):
    """Log-probs of all completions, left to the sampler's support, sum to 1; next tokens are the softmax."""
    world = text.completions(24, 2, 1)
    with jax.enable_x64(False):
        prompts = ragged([[5, 6, 7], [8, 9]])
        logp = text.sequences(log_prob(model), params, prompts, world)
    np.testing.assert_allclose(jnp.exp(logp).sum(-1), 1, atol=1e-5)
    with jax.enable_x64(False):
        first = log_prob(model)(params, prompts, Completion(np.array([[3], [3]]), np.ones((2, 1), bool)))
    np.testing.assert_allclose(text.next_tokens(world, logp, 24)[:, 0, 3], first[:, 0], atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_both_mixtures_agree_at_their_ends(beta):
    one, other = policy(table(1)), policy(table(2))
    want = other if beta else one
    np.testing.assert_allclose(text.step_mixture(WORLD, one, other, beta, 3), want, atol=1e-12)
    np.testing.assert_allclose(games.mixture(one, other, beta), want, atol=1e-12)


def test_the_step_mixture_is_the_one_that_sampling_makes_and_not_that_of_sequences():
    """Against ``geometric_mixture`` run over the very tables, prefix by prefix."""
    one, other, beta = table(1), table(2), 0.3

    def process(params):
        index = {}
        for y, row in enumerate(text.prefixes(WORLD)):
            for n in range(int(WORLD.mask[y].sum())):
                index[int(row[n])] = tuple(WORLD.tokens[y, :n].tolist())
        numbers = {prefix: number for number, prefix in index.items()}

        def step(prefix, token):
            prefix = (*prefix, int(token[0]))
            return prefix, params["logits"][numbers[prefix]][None]

        return Process(step, (), params["logits"][0][None])

    mixed = geometric_mixture(process(one), process(other), beta)
    for y in range(len(WORLD.tokens)):
        carry, logits, total = mixed.carry, mixed.logits, 0.0
        for n in range(int(WORLD.mask[y].sum())):
            token = WORLD.tokens[y, n : n + 1]
            total += float(jax.nn.log_softmax(logits)[0, token[0]])
            if n + 1 < WORLD.mask[y].sum():
                carry, logits = mixed.step(carry, token)
        want = text.step_mixture(WORLD, policy(one), policy(other), beta, 3)[0, y]
        assert total == pytest.approx(float(want), abs=1e-6)
    step, sequence = (
        text.step_mixture(WORLD, policy(one), policy(other), beta, 3),
        games.mixture(policy(one), policy(other), beta),
    )
    assert 0.5 * float(abs(jnp.exp(step) - jnp.exp(sequence)).sum()) > 1e-3


def lettered():
    """A game of three prompts over the world, from an intransitive oracle on texts."""
    replies = [
        "".join("abe"[t] for t, m in zip(*row, strict=True) if m) for row in zip(*vars(WORLD).values(), strict=True)
    ]
    kind = {reply: (reply.count("a") + 2 * reply.count("b")) % 3 for reply in replies}

    def oracle(prompt, reply, other):
        turn = (kind[reply] - kind[other] + len(prompt) - 1) % 3 if kind[reply] != kind[other] else 0
        back = (kind[other] - kind[reply] + len(prompt) - 1) % 3 if kind[reply] != kind[other] else 0
        return 0.5 + 0.25 * (np.sign(turn % 3 - 1.5) - np.sign(back % 3 - 1.5)) * (turn != back)

    return text.from_oracle(oracle, ["x"], replies, policy(table(2)), 0.3)


def test_an_oracle_and_a_reference_make_a_game():
    game = lettered()
    np.testing.assert_allclose(game.p + game.p.swapaxes(1, 2), 1)
    np.testing.assert_allclose(game.log_mu, policy(table(2)), atol=1e-6)
    assert float(games.exploitability(game, solve.nash(game).log_policy)) < 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_deep_loss_has_the_enumerated_gradient(beta):
    """losses.nash_md on every (y, y') with its exact weight, completions of unequal length and all."""
    game, params = lettered(), table(1)
    opponent = text.step_mixture(WORLD, policy(params), game.log_mu, beta, 3)
    want = text.nash_md_gradient(policy, params, game, opponent)["logits"]
    count = len(WORLD.tokens)
    prompts = Prompt(*(np.repeat(x, count, 0) for x in vars(PROMPT).values()))
    response = Response(WORLD, reference_logp=text.tabular(WORLD)(table(2), prompts, WORLD))
    p = games.wins(game, opponent)[0]  # linear in p, so that y' may be averaged out first
    half = jnp.full_like(p, 0.5)
    matrix = jnp.stack([jnp.stack([half, p], 1), jnp.stack([1 - p, half], 1)], 1)
    batch = PreferenceBatch(prompts, (response, response), matrix)
    objective = PreferenceGradient(functools.partial(losses.nash_md, tau=0.3))

    def weighted(theta):
        """The objective is a mean over rows: each row alone, weighted by pi(y)."""

        def row_loss(row):
            one = jax.tree.map(lambda x: x[None], row)
            return objective(theta, one, None, log_prob=text.tabular(WORLD))[0]

        rows = jax.vmap(row_loss)(jax.tree.map(jnp.asarray, batch))
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(policy(theta)[0])) * rows)

    np.testing.assert_allclose(-jax.grad(weighted)(params)["logits"], want, atol=1e-10)


def test_the_gradient_vanishes_at_the_nash_of_the_mixtures_temperature():
    """Against the mixture of whole sequences, the fixed point's mixture is the Nash at tau / (1 - beta)."""
    game, beta = lettered(), 0.25
    mixed = solve.regularised_nash(game, 0.3 / (1 - beta)).log_policy
    fixed = jax.nn.log_softmax((mixed - beta * np.asarray(game.log_mu)) / (1 - beta))
    logits = {"logits": jnp.where(jnp.isfinite(t := text.next_tokens(WORLD, fixed, 3)[0]), t, -50.0)}
    gradient = text.nash_md_gradient(policy, logits, game, mixed)["logits"]
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
