"""Games of text: enumerated worlds, both mixtures, and the gradient of the deep loss."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.games import game as games
from alignjax.games import solve, text
from alignjax.models.log_probs import log_prob
from alignjax.objectives import PreferenceGradient
from alignjax.sampling import process as decoding
from alignjax.types import Completion, PreferenceBatch, Prompt, Response
from tests.conftest import ragged
from tests.enumerated import as_policy
from tests.test_games import float64

__all__ = ["float64"]
EOS = 2
WORLD = text.enumerate_completions(3, 3, EOS)
PROMPT = ragged([[0]])
PREFIXES = int(text.prefix_numbers(WORLD).max()) + 1


def table(seed):
    return {"logits": jax.random.normal(jax.random.key(seed), (PREFIXES, 3))}


def policy(params):
    return text.sequence_log_probs(text.tabular_log_prob(WORLD), params, PROMPT, WORLD)


def test_completions_are_all_that_end_with_eos_or_at_the_limit():
    rows = [tuple(t[m].tolist()) for t, m in zip(WORLD.tokens, WORLD.mask, strict=True)]
    assert len(rows) == len(set(rows)) == 1 + 2 + 4 * 3 and rows == sorted(rows)
    assert all((row[-1] == EOS or len(row) == 3) and EOS not in row[:-1] for row in rows)
    assert PREFIXES == 1 + 2 + 4
    assert len(text.enumerate_completions(4, 2, 0).tokens) == 1 + 3 * 4


def test_a_tabular_policy_is_a_distribution_whose_next_tokens_are_its_table():
    logp = policy(table(0))
    assert float(jnp.exp(logp).sum()) == pytest.approx(1, abs=1e-14)
    got = text.next_token_log_probs(WORLD, logp, 3)[0]
    np.testing.assert_allclose(got, jax.nn.log_softmax(table(0)["logits"]), atol=1e-12)


def test_a_decoder_is_a_policy_over_the_world(model, params):
    """Log-probs of all completions, left to the sampler's support, sum to 1; next tokens are the softmax."""
    world = text.enumerate_completions(24, 2, 1)
    with jax.enable_x64(False):
        prompts = ragged([[5, 6, 7], [8, 9]])
        logp = text.sequence_log_probs(log_prob(model), params, prompts, world)
    np.testing.assert_allclose(jnp.exp(logp).sum(-1), 1, atol=1e-5)
    with jax.enable_x64(False):
        first = log_prob(model)(params, prompts, Completion(np.array([[3], [3]]), np.ones((2, 1), bool)))
    np.testing.assert_allclose(text.next_token_log_probs(world, logp, 24)[:, 0, 3], first[:, 0], atol=1e-4)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_both_mixtures_agree_at_their_ends(beta):
    first, second = policy(table(1)), policy(table(2))
    want = second if beta else first
    np.testing.assert_allclose(text.token_mixture(WORLD, first, second, beta, 3), want, atol=1e-12)
    np.testing.assert_allclose(games.mixture_policy(first, second, beta), want, atol=1e-12)


def test_the_token_mixture_is_the_sampled_one_and_differs_from_the_mixture_of_sequences():
    """Against ``sampling.process.geometric_mixture``, prefix by prefix over the same tables."""
    first, second, beta = table(1), table(2), 0.3

    def process(params):
        index = {}
        for y, row in enumerate(text.prefix_numbers(WORLD)):
            for n in range(int(WORLD.mask[y].sum())):
                index[int(row[n])] = tuple(WORLD.tokens[y, :n].tolist())
        numbers = {prefix: number for number, prefix in index.items()}

        def step(prefix, token):
            prefix = (*prefix, int(token[0]))
            return prefix, params["logits"][numbers[prefix]][None]

        return decoding.Process(step, (), params["logits"][0][None])

    mixed = decoding.geometric_mixture(process(first), process(second), beta)
    for y in range(len(WORLD.tokens)):
        carry, logits, total = mixed.carry, mixed.logits, 0.0
        for n in range(int(WORLD.mask[y].sum())):
            token = WORLD.tokens[y, n : n + 1]
            total += float(jax.nn.log_softmax(logits)[0, token[0]])
            if n + 1 < WORLD.mask[y].sum():
                carry, logits = mixed.step(carry, token)
        want = text.token_mixture(WORLD, policy(first), policy(second), beta, 3)[0, y]
        assert total == pytest.approx(float(want), abs=1e-6)
    step, whole = (
        text.token_mixture(WORLD, policy(first), policy(second), beta, 3),
        games.mixture_policy(policy(first), policy(second), beta),
    )
    assert 0.5 * float(abs(jnp.exp(step) - jnp.exp(whole)).sum()) > 1e-3


def oracle_game():
    """Returns a game over the world, from an intransitive oracle on texts."""
    replies = [
        "".join("abe"[t] for t, m in zip(*row, strict=True) if m) for row in zip(*vars(WORLD).values(), strict=True)
    ]
    kind = {reply: (reply.count("a") + 2 * reply.count("b")) % 3 for reply in replies}

    def oracle(prompt, reply, other):
        turn = (kind[reply] - kind[other] + len(prompt) - 1) % 3 if kind[reply] != kind[other] else 0
        back = (kind[other] - kind[reply] + len(prompt) - 1) % 3 if kind[reply] != kind[other] else 0
        return 0.5 + 0.25 * (np.sign(turn % 3 - 1.5) - np.sign(back % 3 - 1.5)) * (turn != back)

    return text.game_from_oracle(oracle, ["x"], replies, policy(table(2)), 0.3)


def test_an_oracle_and_a_reference_make_a_game():
    game = oracle_game()
    np.testing.assert_allclose(game.p + game.p.swapaxes(1, 2), 1)
    np.testing.assert_allclose(game.log_mu, policy(table(2)), atol=1e-6)
    assert float(games.exploitability(game, solve.nash(game).log_policy)) < 1e-9


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_deep_loss_has_the_enumerated_gradient(beta):
    """Nash-MD's objective on every (y, y') with its exact weight; completions have unequal lengths."""
    game, params, log_prob = oracle_game(), table(1), text.tabular_log_prob(WORLD)
    opponent = text.token_mixture(WORLD, policy(params), game.log_mu, beta, 3)
    want = text.nash_md_gradient(policy, params, game, opponent)["logits"]
    count = len(WORLD.tokens)
    prompts = Prompt(*(np.repeat(x, count, 0) for x in vars(PROMPT).values()))
    p = games.win_probability(game, opponent)[0]  # the loss is linear in p, so that y' may be averaged out first
    response = Response(WORLD, reference_logp=log_prob(table(2), prompts, WORLD))
    preference = jnp.stack(
        [jnp.stack([jnp.full_like(p, 0.5), p], -1), jnp.stack([1 - p, jnp.full_like(p, 0.5)], -1)], 1
    )
    batch = PreferenceBatch(prompts, (response, Response(WORLD)), preference)
    objective = PreferenceGradient(partial(losses.nash_md, tau=0.3))

    def weighted(theta):
        """The objective is a mean over rows: each row alone, weighted by pi(y)."""

        def loss(i):
            row = jax.tree.map(lambda x: jnp.asarray(x)[i][None], batch)
            return objective(theta, row, None, policy=as_policy(log_prob))[0]

        return jnp.sum(jax.lax.stop_gradient(jnp.exp(policy(theta)[0])) * jax.vmap(loss)(jnp.arange(count)))

    np.testing.assert_allclose(-jax.grad(weighted)(params)["logits"], want, atol=1e-10)


def test_the_gradient_vanishes_at_the_nash_of_the_mixtures_temperature():
    """Against the mixture of whole sequences, the fixed point's mixture is the Nash at tau / (1 - beta)."""
    game, beta = oracle_game(), 0.25
    mixed = solve.regularised_nash(game, 0.3 / (1 - beta)).log_policy
    fixed = jax.nn.log_softmax((mixed - beta * np.asarray(game.log_mu)) / (1 - beta))
    logits = {"logits": jnp.where(jnp.isfinite(t := text.next_token_log_probs(WORLD, fixed, 3)[0]), t, -50.0)}
    gradient = text.nash_md_gradient(policy, logits, game, mixed)["logits"]
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
