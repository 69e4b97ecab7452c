"""What is said of a rated pool: Markdown for the screen and the report, JSON, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from alignjax.preferences.rating_intervals import Intervals, RatedPool
from alignjax.preferences.ratings import CyclicTriple
from alignjax.reporting.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRIPLES, _CELLS = 12, 3  # the most that the text names; the JSON has all
_NOTE = """Lottery: the mixture of the pool's policies that none of them beats (Nash; a maximal lottery). Nash average:
P(row beats the lottery) - 1/2, which is 0 for every policy that the lottery plays. Elo: a Bradley-Terry fit. 400 points
are odds of 10 to 1, the pool's mean is 0, and cycles are not seen. Exploitability: P - 1/2 of the policy of the pool
that beats the row most often. Win rates are those of the row over the column.
"""


def rating_section(rated: RatedPool) -> str:
    """Returns the tables of a pool and what they mean, as Markdown."""
    parts = [f"## Ratings of the pool, {rated.title}\n", _rating_table(rated), _NOTE, _interval_note(rated)]
    parts += [_condorcet_line(rated), _lottery_line(rated), _fit_line(rated), _triple_part(rated), _clone_part(rated)]
    return "\n".join(parts)


def _rating_table(rated: RatedPool) -> str:
    """Returns a row for each policy, the largest mass and then the highest Elo first."""
    names, r, found = _names(rated), rated.ratings, rated.intervals
    order = sorted(range(len(names)), key=lambda i: (-round(float(r.lottery.mass[i]), 9), -r.fit.elo[i]))
    rows = []
    for i in order:
        exploiter = r.exploiter[i]
        cells = [
            f"{_text(values[i], form)}{_bounds(found, field, i, form)}"
            for values, field, form in (
                (r.lottery.mass, "mass", ".3f"),
                (r.nash, "nash", ".3f"),
                (r.fit.elo, "elo", "+.0f"),
                (r.exploitability, "exploitability", ".3f"),
            )
        ]
        cells.append("-" if exploiter is None else names[exploiter])
        rows.append([names[i], *cells, *([] if found is None else [f"{found.condorcet[i]:.2f}"])])
    header = ["policy", "lottery", "Nash average", "Elo", "exploitability", "by"]
    return markdown_table([*header, *([] if found is None else ["Condorcet winner"])], rows)


def _names(rated: RatedPool) -> list[str]:
    """Returns the policies' names as cells of a table."""
    return [" ".join(name.split()).replace("|", "\\|") for name in rated.pool.policies]


def _text(value: float, form: str) -> str:
    """Returns a number as text, without a negative zero."""
    text = format(value, form)
    return text if float(text) else format(0.0, form)


def _bounds(found: Intervals | None, field: str, i: int, form: str) -> str:
    """Returns an interval in brackets; nothing where there is none."""
    return "" if found is None else " [{}, {}]".format(*(_text(end, form) for end in getattr(found, field)[i]))


def _interval_note(rated: RatedPool) -> str:
    """Returns what the intervals are of."""
    if (found := rated.intervals) is None:
        if rated.pool.comparisons is None:
            return 'No intervals: the number of comparisons is not known; a JSON file may have it as "n".\n'
        if rated.pool.comparisons.min() < 2:
            return "No intervals: a cell has one comparison.\n"
        return "No intervals were asked for.\n"
    how = "the prompts, the same for all cells" if found.is_paired else "each cell on its own, as a binomial"
    note = (
        f"In brackets, of {found.replicates} resamples of {how}, seed {found.seed}:\n"
        "Elo's 95% interval; the middle 95% of lottery and Nash average, which is no interval, because they jump\n"
        "where policies are nearly equal. Exploitability: an interval of at least 95%, from those of all its cells\n"
        "at once. Condorcet winner: in that share of the resamples.\n"
    )
    if found.is_paired or len(rated.pool.policies) < 3:
        return note
    return note + (
        "The cells are taken to share no prompt and no reply. Those of a Tournament share both, and Elo's intervals\n"
        "are then too narrow: give the Tournament's folder, which has the votes.\n"
    )


def _condorcet_line(rated: RatedPool) -> str:
    winner = rated.ratings.condorcet
    if winner is None:
        return "There is no Condorcet winner: every policy loses to or ties with another one.\n"
    return f"The Condorcet winner is {_names(rated)[winner]}: it beats every other policy.\n"


def _lottery_line(rated: RatedPool) -> str:
    """Returns whether the lottery is the only one; if not, the range of each mass."""
    names, lottery = _names(rated), rated.ratings.lottery
    if lottery.is_unique:
        return f"The lottery is the only one; its duality gap is {lottery.gap:.1e}.\n"
    ranges = [f"{names[i]} {lottery.low[i]:.3f} to {lottery.high[i]:.3f}" for i in np.flatnonzero(lottery.high > 0)]
    return (
        f"Several lotteries are Nash, with these masses: {'; '.join(ranges)}. The table has the one of the largest\n"
        f"entropy, copies of a policy taken as one; its duality gap is {lottery.gap:.1e}.\n"
    )


def _fit_line(rated: RatedPool) -> str:
    """Returns how well one number a policy explains the win rates."""
    names, fit = _names(rated), rated.ratings.fit
    cells = sorted(zip(*np.triu_indices(len(names), 1), strict=True), key=lambda c: -abs(fit.residual[c]))[:_CELLS]
    worst = []
    for i, j in cells:
        if abs(fit.residual[i, j]) >= 0.0005:
            rate = rated.pool.rate[i, j]
            worst.append(f"{names[i]} over {names[j]} {rate:.3f}, fitted {rate - fit.residual[i, j]:.3f}")
    line = f"The Bradley-Terry fit leaves {fit.root_mean_square:.3f} of the win rates unexplained (root mean square)"
    line += f"; most in {'; '.join(worst)}.\n" if worst else ".\n"
    if fit.has_virtual_wins:
        line += (
            "Some policies never lose to some others, so their distance has no likeliest value: half a virtual win on\n"
            "each side of every pair makes it finite"
            + (", and each cell counts as 100 comparisons.\n" if rated.pool.comparisons is None else ".\n")
        )
    return line


def _triple_part(rated: RatedPool) -> str:
    """Returns the share of cyclic triples, and the strongest as a table."""
    names, r, found = _names(rated), rated.ratings, rated.intervals
    if not r.decided_triples:
        return "No three policies are without a tie, so there is no cyclic triple.\n"
    share = f"{len(r.triples)} of the {r.decided_triples} triples without a tie"
    if not r.triples:
        return f"Cyclic triples: {share}.\n"
    rows = []
    for number, triple in enumerate(r.triples[:_TRIPLES]):
        cells = [" > ".join(names[i] for i in (*triple.policies, triple.policies[0])), f"{triple.weakest:.3f}"]
        rows.append(
            [*cells, _weakest_link(names, triple), *([] if found is None else [f"{found.triples[number]:.2f}"])]
        )
    header = ["cycle", "weakest rate", "weakest link", *([] if found is None else ["of the resamples"])]
    line = f"Cyclic triples: {share}, a share of {len(r.triples) / r.decided_triples:.3f}. The strongest first:\n"
    return f"{line}\n{markdown_table(header, rows)}"


def _weakest_link(names: Sequence[str], triple: CyclicTriple) -> str:
    """Returns the two policies of the link that is nearest to a tie."""
    k = triple.links.index(triple.weakest)
    return f"{names[triple.policies[k]]} > {names[triple.policies[(k + 1) % 3]]}"


def _clone_part(rated: RatedPool) -> str:
    """Returns what copies change, as a table."""
    names, rows = _names(rated), []
    for effect in rated.clones:
        order = "; ".join(f"{names[i]} passes {names[j]}" for i, j in effect.exchanged) or "-"
        whose = "-" if effect.changed is None else names[effect.changed]
        rows.append([names[effect.policy], f"{effect.nash:.1e}", f"{effect.elo:.1f}", whose, order])
    header = ["a second copy of", "Nash average of others", "Elo of others", "most of", "order by Elo"]
    return (
        "The largest change of another policy's rating when a policy enters the pool twice:\n\n"
        f"{markdown_table(header, rows)}"
    )


def rating_numbers(rated: RatedPool) -> dict[str, Any]:
    """Returns everything that is known of a pool, as JSON; policies by name."""
    names, r = rated.pool.policies, rated.ratings
    triples = [
        {"policies": [names[i] for i in t.policies], "links": list(t.links), "weakest": t.weakest} for t in r.triples
    ]
    clones = [
        {
            "policy": names[c.policy],
            "nash_change": c.nash,
            "elo_change": c.elo,
            "changed": _name(names, c.changed),
            "exchanged": [[names[i], names[j]] for i, j in c.exchanged],
        }
        for c in rated.clones
    ]
    return {
        "title": rated.title,
        "policies": list(names),
        "win_rate": rated.pool.rate.tolist(),
        "n": None if rated.pool.comparisons is None else rated.pool.comparisons.tolist(),
        "lottery": {name: getattr(r.lottery, name).tolist() for name in ("mass", "low", "high")}
        | {"is_unique": r.lottery.is_unique, "gap": r.lottery.gap},
        "nash_average": r.nash.tolist(),
        "bradley_terry": r.fit.reward.tolist(),
        "elo": r.fit.elo.tolist(),
        "residual": r.fit.residual.tolist(),
        "residual_root_mean_square": r.fit.root_mean_square,
        "has_virtual_wins": r.fit.has_virtual_wins,
        "condorcet_winner": _name(names, r.condorcet),
        "exploitability": r.exploitability.tolist(),
        "exploited_by": [_name(names, j) for j in r.exploiter],
        "decided_triples": r.decided_triples,
        "cyclic_triples": triples,
        "clones": clones,
        "bootstrap": _interval_numbers(rated.intervals),
    }


def _name(names: Sequence[str], i: int | None) -> str | None:
    return None if i is None else names[i]


def _interval_numbers(found: Intervals | None) -> dict[str, Any] | None:
    """Returns the intervals as JSON: [low, high] of each policy."""
    if found is None:
        return None
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in found._asdict().items()}


def rating_picture(rated: RatedPool) -> Figure:
    """Returns bars: the mass of each policy in the lottery beside its Elo, with their intervals."""
    from matplotlib.figure import Figure  # imported here: it takes half a second

    r, found, places = rated.ratings, rated.intervals, np.arange(len(rated.pool.policies))
    figure = Figure(figsize=(8.4, 1.4 + 0.4 * len(places)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, values, bounds, label in (
        (left, r.lottery.mass, None if found is None else found.mass, "mass in the lottery"),
        (right, r.fit.elo, None if found is None else found.elo, "Elo"),
    ):
        # A percentile interval need not hold the value itself.
        errors = None if bounds is None else np.clip([values - bounds[:, 0], bounds[:, 1] - values], 0, None)
        axes.barh(places, values, xerr=errors, color="C0" if axes is left else "C1", capsize=3)
        axes.axvline(0, color="k", linewidth=0.8)
        axes.set(xlabel=label)
    left.set(yticks=places, yticklabels=rated.pool.policies)
    left.invert_yaxis()
    figure.suptitle(f"ratings of the pool, {rated.title}", fontsize=10)
    return figure
