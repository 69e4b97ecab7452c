"""The theory of Nash learning (2312.00886) in exact games: dynamics against each other, and the worked examples.

    alignjax run experiments/nlhf/theory.py --workdir runs/theory
    alignjax run experiments/nlhf/theory.py --workdir runs/theory --set race.function.tau=0.01 --redo

The pictures show KL to the regularised Nash and duality gap against preference evaluations. A dynamic that asks twice a
step gets half the steps. The dashed line is Theorem 1's bound. A race takes about 40 s on two cores.
"""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import numpy as np
from matplotlib.figure import Figure

import alignjax as aj
from alignjax.games import dynamics, game, simulation, solve, text, zoo
from alignjax.games.dynamics import Dynamic
from alignjax.games.game import Game
from alignjax.reporting.tables import markdown_table
from alignjax.types import Prompt

MU = (0.6, 0.3, 0.1)
Claim = Callable[[np.ndarray, float, float], np.ndarray]
"""(steps, tau, KL at the start) -> the KL that a theorem allows."""


def zoo_games(tau: float) -> dict[str, Game]:
    """Returns the worked examples, and one random game of fifty actions and three contexts."""
    small = (zoo.rock_paper_scissors, zoo.dice, zoo.cycle, partial(zoo.diversity, 0.1))
    names = ("rock-paper-scissors", "dice", "cycle", "diversity")
    many = zoo.near_deterministic(0, 3, 50)
    return {
        **{name: build(reference=MU, tau=tau) for name, build in zip(names, small, strict=True)},
        "50 actions, 3 contexts": game.from_matrix(many, zoo.random_reference(1, 3, 50), tau),
    }


def arms(tau: float) -> dict[str, tuple[Dynamic, Claim | None]]:
    """Returns every dynamic with the step sizes of its theorem; where the theorem leaves them open, h = tau."""
    h = 1 / (tau + 3)
    return {
        "Nash-MD": (dynamics.exact_nash_md(dynamics.theorem_1_step_size), lambda t, tau, start: 8 / (tau**2 * (t + 1))),
        "Nash-MD, constant": (dynamics.exact_nash_md(tau), None),
        "OMD, h=.5": (dynamics.omd(0.5), None),
        "INPO": (dynamics.exact_inpo(), lambda t, tau, start: 32 / (tau**2 * (t + 1))),
        "MMD, h=tau": (dynamics.mmd(tau), lambda t, tau, start: start * (1 + tau**2) ** -t),
        "EGPO": (dynamics.egpo(h), lambda t, tau, start: start * (1 - h * tau) ** t),
        "Nash-MP": (dynamics.nash_mp(2 * tau), lambda t, tau, start: start * (1 + 2 * tau) ** -t),
        "Nash-EMA": (dynamics.nash_ema(tau, 0.9), None),
        "fictitious play": (dynamics.fictitious_play(), None),
        "Nash-MD-PG, b=.125": (dynamics.nash_md_pg(1.0, 0.125), None),
        "IPO-MD, b=.125": (dynamics.ipo_md(0.25, 0.125), None),
        "online IPO": (dynamics.exact_online_ipo(0.25), None),
    }


def unregularised() -> dict[str, tuple[Dynamic, Claim | None]]:
    """Returns dynamics that look for the Nash policy of P itself; their measure is exploitability."""
    return {
        "MPO": (dynamics.mmd(0.5, magnet_every=100), None),
        "COMAL": (dynamics.comal(0.5, 100), None),
        "SPPO, average": (dynamics.multiplicative_weights(0.1), None),
        "optimistic MWU": (dynamics.optimistic_weights(0.5), None),
    }


def race(
    games: Mapping[str, Game],
    runners: Mapping[str, tuple[Dynamic, Claim | None]],
    evaluations: int,
    records: int,
    batch: int = 0,
    seeds: int = 1,
) -> aj.Finding:
    """Runs every dynamic on every game for ``evaluations`` preference evaluations; returns a table and pictures.

    With ``batch``, an evaluation is estimated from that many sampled opponents; figures are medians over seeds.
    """
    if evaluations < 2 or min(records, seeds) < 1 or batch < 0:
        found = f"evaluations={evaluations}, records={records}, seeds={seeds}, batch={batch}"
        raise aj.UserError(f"{found}: need at least 2 evaluations, 1 record, 1 seed and no negative batch")
    keys = jax.random.split(jax.random.key(0), seeds)
    rows, numbers = [], {}
    figures = {"kl": "KL to the regularised Nash, nats", "gap": "duality gap", "exploitability": "exploitability"}
    pictures = {name: Figure(figsize=(3.4 * len(games) + 1.5, 3.4), layout="constrained") for name in figures}
    panels = {name: picture.subplots(1, len(games), squeeze=False)[0] for name, picture in pictures.items()}
    for column, (where, played) in enumerate(games.items()):
        nash, tau = solve.regularised_nash(played).log_policy, float(played.tau)
        start = float(game.kl(played, nash, played.log_mu))
        for number, (name, (dynamic, claim)) in enumerate(runners.items()):
            steps = np.unique(np.geomspace(1, evaluations // dynamic.evaluations, records).astype(int))
            stacked = simulation.stack_games([played])
            trace = simulation.simulate(dynamic, stacked, nash[None], tuple(steps.tolist()), keys, batch)
            seen = {key: np.median(getattr(trace, key)[0], axis=0) for key in (*figures, "evaluations")}
            for key, axes in panels.items():
                above = np.maximum(seen[key], 1e-17)
                axes[column].loglog(seen["evaluations"], above, f"C{number}" + (":" if number > 9 else "-"), label=name)
            allowed = claim(steps, tau, start) if claim else None
            kept = "-" if allowed is None else "kept" if np.all(seen["kl"] <= allowed + 1e-15) else "BROKEN"
            last = [f"{seen[key][-1]:.1e}" for key in figures]
            rows.append([where, name, *last, "-" if allowed is None else f"{allowed[-1]:.1e}", kept])
            numbers[f"{where}/{name}"] = {key: value.tolist() for key, value in seen.items()}
        budget = np.geomspace(1, evaluations, 50)
        panels["kl"][column].loglog(budget, 8 / (tau**2 * (budget + 1)), "k--", linewidth=1, label="Theorem 1's bound")
        for key, axes in panels.items():
            axes[column].set(title=where, xlabel="preference evaluations", ylabel="" if column else figures[key])
    for axes in panels.values():
        axes[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    header = ["game", "dynamic", "KL", "gap", "exploitability", "KL allowed", "at every step"]
    return aj.Finding(markdown_table(header, rows), pictures, numbers)


def regularised(tau: float, evaluations: int, records: int) -> aj.Finding:
    """Returns the race of all dynamics to the regularised Nash policy."""
    finding = race(zoo_games(tau), arms(tau), evaluations, records)
    return finding._replace(text=f"## After {evaluations} preference evaluations, tau = {tau}\n\n{finding.text}")


def without(tau: float, evaluations: int, records: int) -> aj.Finding:
    """Returns the race to the Nash policy of P itself."""
    finding = race(zoo_games(tau), unregularised(), evaluations, records)
    pictures = {"exploitability": finding.pictures["exploitability"]}
    return aj.Finding(f"## Towards the Nash of P itself\n\n{finding.text}", pictures, finding.numbers)


def sampled(tau: float, evaluations: int, records: int, batch: int, seeds: int) -> aj.Finding:
    """Returns the race with preferences that are estimated from ``batch`` judgements."""
    chosen = ("Nash-MD", "OMD, h=.5", "MMD, h=tau", "EGPO", "Nash-MP", "INPO")
    runners = {name: (arms(tau)[name][0], None) for name in chosen}  # the theorems are about exact preferences
    finding = race(zoo_games(tau), runners, evaluations, records, batch, seeds)
    title = f"## The same with {batch} sampled judgements an action and evaluation, tau = {tau}, {seeds} seeds"
    return finding._replace(text=f"{title}\n\n{finding.text}", pictures={"kl": finding.pictures["kl"]})


def mixtures(seeds: int, scale: float) -> aj.Finding:
    """Returns how far the mixture that decoding makes token by token is from that of whole sequences (App. F.1).

    The world has three tokens and length three. The figures, total variation and KL(sequences, tokens), are means over
    random policies.
    """
    if seeds < 1:
        raise aj.UserError(f"seeds={seeds} must be at least 1")
    world, rows = text.enumerate_completions(3, 3, eos=2), []
    prompt, log_prob = Prompt(np.zeros((1, 1), np.int32), np.ones((1, 1), bool)), text.tabular_log_prob(world)
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=scale, size=(seeds, 2, text.prefix_numbers(world).max() + 1, 3))
    tables = ([{"logits": table} for table in pair] for pair in logits)
    policies = [[text.sequence_log_probs(log_prob, table, prompt, world) for table in pair] for pair in tables]
    for beta in (0.0, 0.125, 0.25, 0.5, 0.75, 1.0):
        distances = []
        for policy, reference in policies:
            sequence = game.mixture_policy(policy, reference, beta)
            token = text.token_mixture(world, policy, reference, beta, 3)
            distance = 0.5 * np.abs(np.exp(sequence) - np.exp(token)).sum()
            distances.append((distance, float(game.divergence(sequence, token)[0])))
        rows.append([beta, *map(float, np.mean(distances, 0))])
    table = markdown_table(["beta", "total variation", "KL, nats"], [[f"{x:.3f}" for x in row] for row in rows])
    return aj.Finding(f"## The mixture of sequences against the mixture of tokens\n\n{table}", {}, rows)


def examples() -> aj.Finding:
    """Returns the paper's worked examples: its number and ours."""
    dice, voters, elo = (np.asarray(build().p[0]) for build in (zoo.dice, zoo.voters, zoo.elo))
    apart = np.array([0, 0, 1.0]) @ elo @ np.array([2 / 3, 1 / 3, 0])
    diverse = zoo.diversity(0.1)
    rows = [
        ("dice: P(1 > 2), App. C.1", 5 / 9, dice[0, 1]),
        ("dice: Nash of the first", 1 / 3, solve.nash(zoo.dice()).policy[0, 0]),
        ("voters: P(1 > 2), App. C.2", 2 / 3, voters[0, 1]),
        ("Elo: P(y2 > y1), App. A", 9 / 10, elo[1, 0]),
        ("Elo: P(y3 > y1)", 2 / 3, elo[2, 0]),
        ("Elo: P(y3 > y2)", 2 / 11, elo[2, 1]),
        ("Elo: best win rate against best Elo", 50 / 99, apart),
        ("diversity, eps=.1: P(y2 > y1), section 3.2", 2 / 3 - 0.05, float(diverse.p[0, 1, 0])),
        ("diversity, eps=.1: Nash of y1", 1 / 3 + 0.05, solve.nash(diverse).policy[0, 0]),
        ("diversity, eps=.1: Nash of y3", 1 / 3 - 0.1, solve.nash(diverse).policy[0, 2]),
    ]
    cells = [[what, f"{paper:.12f}", f"{here:.12f}", f"{abs(paper - here):.0e}"] for what, paper, here in rows]
    text = markdown_table(["example", "the paper", "here", "apart"], cells)
    return aj.Finding(
        f"## Worked examples of 2312.00886\n\n{text}", {}, [[what, paper, float(x)] for what, paper, x in rows]
    )


def get_config(evaluations: int = 20_000, records: int = 60) -> aj.Experiment:
    """Returns the studies; ``records`` are the points of each curve."""
    options = {"evaluations": evaluations, "records": records}
    return aj.Experiment(
        task=None,
        stages={
            "examples": aj.Study(examples),
            "mixtures": aj.Study(partial(mixtures, seeds=20, scale=1.0)),
            "race": aj.Study(partial(regularised, tau=0.1, **options)),
            "discriminating": aj.Study(partial(regularised, tau=0.01, **options)),
            "sampled": aj.Study(partial(sampled, tau=0.1, evaluations=2000, records=records, batch=8, seeds=8)),
            "unregularised": aj.Study(partial(without, tau=0.1, **options)),
        },
    )
