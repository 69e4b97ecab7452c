"""How far apart must the two prompts of RLCD be? Label accuracy against the gap, beside App. N of 2307.12950.

    alignjax run experiments/rlcd/gap.py --workdir runs/gap
    alignjax run experiments/rlcd/gap.py --workdir runs/gap1 --set seed=1     # another seed
    alignjax run experiments/rlcd/gap.py --workdir runs/small --set small=True

One base model is pretrained on a world whose six affix pairs have gaps from 0 to 4 between the latent means under their
positive and negative side. Its RLCD labels, by affix pair, give accuracy against the gap. Its RLAIF labels, of two
replies to the plain prompt, give a level. The exact oracle says which labels are right.

On two cores that others used too, in 5 minutes (exact 95% intervals; gap.png):

    gap  pairs  RLCD's labels right   App. N  world  shown
    0    604    0.534 [0.490, 0.578]  0.500   0.500  0.08
    0.5  586    0.640 [0.596, 0.682]  0.638   0.640  0.53
    1    616    0.684 [0.642, 0.724]  0.760   0.763  0.70
    2    581    0.834 [0.800, 0.865]  0.921   0.920  1.58
    3    603    0.931 [0.908, 0.951]  0.983   0.981  2.49
    4    610    0.977 [0.961, 0.987]  0.998   0.997  3.38

RLAIF's labels were right on 0.852 [0.829, 0.873]. RLCD's are right more often from a gap of 2.18 on, which the model
shows as 1.75. By App. N the order turns over at 0.95; by its RLCD against the measured RLAIF, at 1.48. So what was
measured is not the world: the small model shows about four fifths of the gaps that it was taught, and its labels are a
little worse than even the shown gap explains.

App. N has closed forms for both: the label of RLCD is right with probability Phi(gap / sqrt 2), that of RLAIF with 3/4
where the annotator's noise is as large as the spread of the qualities. Two things differ here, and each has a column.
The oracle does not see the latent quality, it sees three or four sentences: ``world`` is the accuracy that it would
measure of a writer who follows the world exactly, in closed form too. The trained model may show another gap than the
world taught it: ``shown`` is the gap at which the world's mean scores are those of the model's replies.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

import alignjax as aj
from alignjax.labeling.accuracy import rlaif_accuracy, rlcd_accuracy
from alignjax.labeling.statistics import JudgedPairs, Share, label_accuracy
from alignjax.pipeline.stages.pair_study import share_text
from alignjax.reporting.tables import markdown_table, two_digits
from alignjax.tasks import sandbox
from alignjax.tasks.sandbox_grammar import ILL_FORMED, harmless_score

GAPS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
TWO_PIECES = 0.15  # the share of replies with two pieces of advice: four sentences instead of three
PROMPT, REPLY = 80, 28  # tokens
MEANS = np.linspace(-4, 4, 161)
NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(80)  # of Gauss and Hermite


def score_law(mean: float, sharpness: float) -> np.ndarray:
    """Returns P(12 score = i - 12), [25], of a reply by a writer whose latent quality is N(mean, 1).

    Given z, the 3 or 4 sentences have independent values v in {-1, 0, 1}, proportional to exp(sharpness z v); the score
    is their mean. The integral over z is by 80 nodes of Gauss and Hermite.
    """
    value = np.exp(sharpness * np.outer(NODES + mean, (-1, 0, 1)))
    value /= value.sum(1, keepdims=True)
    law = np.zeros(25)
    for sentences, share in ((3, 1 - TWO_PIECES), (4, TWO_PIECES)):
        total = np.ones((len(NODES), 1))  # P(sum of the values | z), [80, 2 sentences + 1] at the end
        for _ in range(sentences):
            total = sum(np.pad(total * value[:, [v]], ((0, 0), (v, 2 - v))) for v in range(3))
        law[:: 12 // sentences] += share * (WEIGHTS / WEIGHTS.sum()) @ total
    return law


def oracle_accuracy(gap: float, sharpness: float) -> float:
    """Returns how often the oracle calls the positive side better where it does not tie, of a writer who follows the
    world exactly."""
    joint = np.outer(score_law(gap / 2, sharpness), score_law(-gap / 2, sharpness))
    return float(np.tril(joint, -1).sum() / (1 - np.trace(joint)))


def mean_scores(sharpness: float) -> np.ndarray:
    """Returns the mean score of a reply at each of ``MEANS``; it increases."""
    return np.array([score_law(mean, sharpness) @ np.linspace(-1, 1, 25) for mean in MEANS])


def shown_gap(rows: Sequence[Mapping[str, Any]], scores: np.ndarray) -> float | None:
    """Returns the latent gap that explains the mean scores of the replies under the two sides; None without any.

    ``scores`` are the ``mean_scores``. Replies that the grammar cannot make have no latent quality and are left out.
    """
    sides: tuple[list[float], list[float]] = ([], [])  # positive, negative
    for row in rows:
        for side, column in enumerate(("first", "second")):
            if (score := harmless_score(row["prompt"], row[column])) > ILL_FORMED:
                sides[side != row["positive"]].append(score)
    if not all(sides):
        return None
    positive, negative = (np.interp(np.mean(side), scores, MEANS) for side in sides)
    return float(positive - negative)


def crossing(gaps: np.ndarray, accuracy: np.ndarray, level: float) -> float | None:
    """Returns the first gap at which the accuracy, linear between the gaps, rises to the level; None where it does
    not."""
    for i in range(1, len(gaps)):
        if accuracy[i - 1] < level <= accuracy[i]:
            share = (level - accuracy[i - 1]) / (accuracy[i] - accuracy[i - 1])
            return float(gaps[i - 1] + share * (gaps[i] - gaps[i - 1]))
    return None


class Point(NamedTuple):
    """What was measured of one affix pair."""

    gap: float  # of the world
    pairs: int
    ties: float | None  # share that the oracle calls equal
    right: Share  # labels, of the others
    shown: float | None  # the gap of the model's replies


def gap_study(arms: Mapping[str, JudgedPairs], judge: str, gaps: tuple[float, ...], sharpness: float) -> aj.Finding:
    """Returns label accuracy against the gap, beside the closed forms, and where RLCD overtakes RLAIF."""
    scores = mean_scores(sharpness)
    points = [measure(arms["RLCD"], affix, gap, scores) for affix, gap in enumerate(gaps)]
    level = label_accuracy(arms["RLAIF"])
    turns = turning_points(points, level, sharpness)
    rows = [
        [f"{p.gap:g}", str(p.pairs), two_digits(p.ties), share_text(p.right)]
        + [f"{f:.3f}" for f in (rlcd_accuracy(p.gap), oracle_accuracy(p.gap, sharpness))]
        + [two_digits(p.shown)]
        for p in points
    ]
    header = ["gap", "pairs", "ties", "RLCD's labels right", "App. N", "world", "shown"]
    text = f"## Label accuracy against the gap\n\n{markdown_table(header, rows)}\n{_words(level, turns, judge)}"
    numbers = {
        "gaps": [{**point._asdict(), "right": point.right._asdict()} for point in points],
        "rlaif": level._asdict(),
        "turns": turns,
    }
    return aj.Finding(text, {"accuracy": draw(points, level, sharpness)}, numbers)


def measure(arm: JudgedPairs, affix: int, gap: float, scores: np.ndarray) -> Point:
    """Returns what was measured of the pairs of one affix pair, by its number."""
    chosen = [i for i, row in enumerate(arm.rows) if row["affix"] == affix]
    pairs = JudgedPairs([arm.rows[i] for i in chosen], arm.judged[chosen])
    ties = float(np.mean(pairs.judged == 0.5)) if chosen else None
    return Point(gap, len(chosen), ties, label_accuracy(pairs), shown_gap(pairs.rows, scores))


def turning_points(points: Sequence[Point], level: Share, sharpness: float) -> dict[str, float | None]:
    """Returns the gap above which RLCD's labels are right more often than RLAIF's, by several curves."""
    fine = np.linspace(0, 8, 161)
    closed = np.array([rlcd_accuracy(gap) for gap in fine])
    turns = {"by App. N": crossing(fine, closed, rlaif_accuracy())}
    right = [point.right.value for point in points]
    if None in (level.value, *right, *(point.shown for point in points)):
        return turns
    world = np.array([oracle_accuracy(gap, sharpness) for gap in fine])
    return {
        **turns,
        "by App. N's RLCD at the measured RLAIF": crossing(fine, closed, level.value),
        "by the world's RLCD at the measured RLAIF": crossing(fine, world, level.value),
        "measured": crossing(np.array([point.gap for point in points]), np.array(right), level.value),
        "measured, as shown": crossing(np.array([point.shown for point in points]), np.array(right), level.value),
    }


def _words(level: Share, turns: Mapping[str, float | None], judge: str) -> str:
    where = "; ".join(f"{name} {'nowhere' if gap is None else f'{gap:.2f}'}" for name, gap in turns.items())
    return (
        f"RLAIF's labels are right on {share_text(level)}; App. N says {rlaif_accuracy():.2f}.\n"
        f"The gap from which RLCD's labels are right more often: {where}.\n"
        f"The judge is {judge}. Right: of the pairs that it does not call equal; in brackets\n"
        "the exact 95% interval. App. N: Phi(gap / sqrt 2). World: what the oracle would measure of a writer who\n"
        "follows the world exactly. Shown: the gap that explains the mean scores of the model's replies.\n"
    )


def draw(points: Sequence[Point], level: Share, sharpness: float) -> Figure:
    """Returns the picture: closed forms as lines, what was measured as points with exact intervals."""
    picture = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis, fine = picture.subplots(), np.linspace(0, max(point.gap for point in points) + 0.2, 85)
    axis.plot(fine, [rlcd_accuracy(gap) for gap in fine], "C0-", label="RLCD, App. N")
    axis.plot(fine, [oracle_accuracy(gap, sharpness) for gap in fine], "C0--", label="RLCD, a perfect writer")
    axis.axhline(rlaif_accuracy(), color="C1", label="RLAIF, App. N")
    known = [point for point in points if point.right.value is not None]
    values, low, high = np.array([point.right[:3] for point in known]).reshape(-1, 3).T
    gaps, reach = [point.gap for point in known], [values - low, high - values]
    axis.errorbar(gaps, values, reach, fmt="C0o", capsize=3, label="RLCD, at the world's gap")
    shown = [np.nan if point.shown is None else point.shown for point in known]
    axis.plot(shown, values, "o", mfc="none", mec="C0", label="RLCD, at the shown gap")
    if level.value is not None:
        axis.axhline(level.value, color="C1", linestyle="--", label="RLAIF, measured")
        axis.axhspan(level.low, level.high, color="C1", alpha=0.15)
    axis.set(xlabel="gap of the latent means", ylabel="share of labels that are right", ylim=(0.4, 1.02))
    axis.legend(fontsize=8, loc="lower right")
    return picture


def get_config(small: bool = False) -> aj.Experiment:
    """Returns the sweep; ``small`` is a short form that learns little."""
    world = sandbox.World(gaps=GAPS)
    writing = aj.Writing(max_new_tokens=REPLY, buckets=(32, 104), batch=128)
    sizes = aj.JudgeSizes(batch=128, prompt=PROMPT, reply=REPLY)
    base = aj.Pretrain(
        model=aj.TransformerConfig(vocab_size=704, width=192, layers=2, heads=6, kv_heads=3, head_dim=32, hidden=512),
        documents=20_000,
        row=96,
        adam=aj.Adam(lr=3e-3, warmup=50, weight_decay=0.01),
        loop=aj.Loop(steps=1200, batch=12),
    )
    rlcd = aj.Label(generator="base", method=aj.RLCD(), split="train", prompts=3600, writing=writing)
    rlaif = replace(rlcd, method=aj.RLAIF(aj.LanguageModelRater("base")), prompts=1200)
    if small:
        world = replace(world, nouns=8, verbs=6, two_turns=0.0)
        base = replace(
            base,
            model=replace(base.model, vocab_size=576, width=96, layers=2, heads=4, kv_heads=2, head_dim=24, hidden=192),
            documents=2000,
            adam=aj.Adam(lr=5e-3, warmup=20),
            loop=aj.Loop(steps=150, batch=8),
        )
        writing, sizes = replace(writing, buckets=(40,), batch=64), aj.JudgeSizes(batch=64, prompt=24, reply=REPLY)
        rlcd, rlaif = (replace(labels, prompts=64, writing=writing) for labels in (rlcd, rlaif))
    return aj.Experiment(
        task=sandbox.sandbox_task(world),
        stages={
            "base": base,
            "rlcd_pairs": rlcd,
            "rlaif_pairs": rlaif,
            "gap": aj.PairStudy(
                pairs={"RLCD": "rlcd_pairs", "RLAIF": "rlaif_pairs"},
                judge=aj.Oracle("oracle"),
                sizes=sizes,
                function=partial(gap_study, gaps=world.gaps, sharpness=world.sharpness),
            ),
        },
    )
