"""Why a Nash policy and not the best policy for a reward (2312.00886, section 3.2), with language models.

    alignjax run experiments/nlhf/why_nash.py --workdir runs/why_nash               # 6 minutes on two cores
    alignjax run experiments/nlhf/why_nash.py --workdir runs/small --set small=True   # learns nothing

A policy summarises posts of the small world ``alignjax.tasks.post_world``. The annotators' majority is a cycle: the
bold summary beats the careful one, that beats the terse one, and that beats the bold one. One set of pairs, labelled by
the annotators, fits a reward model and a preference model. ``rlhf`` is the policy gradient on the reward. ``nash_md``
is Nash-MD on the preference model. Each is trained with three seeds.

``course-styles.png`` shows, over training, how often the policies write each style, and what a summary of one style
wins against them (their exploitability). The dashed lines are the exact Nash policy of the game of the three styles,
by ``alignjax.games``. The distance in the table is to that policy, in total variation. Nash-MD's own limit is a little
another one, the row "exact: policy", because tau and beta are not 0.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

import alignjax as aj
from alignjax.games import game as games
from alignjax.games import solve
from alignjax.preferences.statistics import mean_interval
from alignjax.reporting.tables import markdown_table
from alignjax.tasks import post_world
from alignjax.tasks.post_grammar import read_post
from alignjax.tasks.post_world import STYLES
from alignjax.tasks.summary import PLAIN_QUERY

POST, SUMMARY = 40, 12  # tokens
BETA, TAU = 0.25, 0.03  # of Nash-MD; tau is RLHF's too
STEPS, EVERY = 175, 25  # of training, and between the points of a curve
WORLD = post_world.PostWorld(facts=2, doubtful=1, sloppy=0.0, query=PLAIN_QUERY)


def get_config(small: bool = False, masses: tuple[float, float, float] = post_world.MASSES) -> aj.Experiment:
    """Returns the study; ``masses`` are those of the three types of annotators."""
    steps, every, seeds = (12, 6, 1) if small else (STEPS, EVERY, 3)
    writing = aj.Writing(max_new_tokens=SUMMARY, buckets=(POST,), batch=128)
    base = aj.Pretrain(
        model=aj.TransformerConfig(vocab_size=512, width=96, layers=2, heads=4, kv_heads=4, head_dim=24, hidden=288),
        documents=4000,
        row=96,
        adam=aj.Adam(lr=2e-3, warmup=5, weight_decay=0.01),
        loop=aj.Loop(steps=20, batch=16),
    )
    sft = aj.FineTune(
        start="base",
        pairs="summaries",
        adam=aj.Adam(lr=2e-3, warmup=50, weight_decay=0.01),
        loop=aj.Loop(steps=160 if small else 800, batch=16),
        row=96,
    )
    pairs = aj.Label(
        generator="sft", method=aj.Judged(aj.Oracle("annotators")), split="train", prompts=4000, writing=writing
    )
    preference = aj.FitPreference(
        start="sft",
        pairs="pairs",
        truth="truth",
        adam=aj.Adam(lr=1e-3),
        loop=aj.Loop(steps=400, batch=32),
        buckets=(POST,),
        response=SUMMARY,
    )
    nash_md = aj.TrainPolicy(
        start="sft",
        reference="sft",
        objective=aj.PreferenceGradient(partial(aj.losses.nash_md, tau=TAU)),
        data=aj.OnlineData(
            preference="preference", samplers=(aj.policy, aj.mixture(beta=BETA)), prompts=400 if small else 6000
        ),
        adam=aj.Adam(lr=1e-4, warmup=5, b1=0.0),
        loop=aj.Loop(steps=steps, batch=48),
        buckets=(POST,),
        max_new_tokens=SUMMARY,
    )
    rlhf = replace(
        nash_md,
        objective=aj.RewardGradient(partial(aj.losses.regularized_policy_gradient, tau=TAU), bound=5.0),
        data=replace(nash_md.data, preference="reward", samplers=(aj.policy, aj.policy)),
    )
    if small:
        tiny = replace(base.model, width=48, layers=1, head_dim=12, hidden=96)
        base = replace(base, model=tiny, documents=500)
        pairs = replace(pairs, prompts=128)
        preference = replace(preference, loop=aj.Loop(steps=10, batch=16))
    stages, points = {}, {"sft 0 0": "sft"}  # a point of a curve is called "arm seed step"
    for (arm, stage), seed in itertools.product({"rlhf": rlhf, "nash_md": nash_md}.items(), range(seeds)):
        name = f"{arm}_{seed}"
        stages[name] = replace(stage, seed=seed, keep_at=tuple(range(every, steps, every)))
        for step in range(every, steps, every):
            stages[f"{name}_{step}"] = aj.KeptPolicy(policy=name, at=step)
            points[f"{arm} {seed} {step}"] = f"{name}_{step}"
        points[f"{arm} {seed} {steps}"] = name
    return aj.Experiment(
        task=post_world.post_task(WORLD, masses),
        stages={
            "base": base,
            "summaries": aj.TaskReplies(1000 if small else 12_000),
            "sft": sft,
            "pairs": pairs,
            "truth": replace(pairs, split="validation", prompts=64 if small else 400),
            "preference": preference,
            "reward": replace(preference, form=aj.bradley_terry),
            **stages,
            "course": aj.ReplyStudy(
                policies=points,
                function=partial(course, masses=masses),
                prompts=48 if small else 500,
                writing=writing,
            ),
        },
    )


class Point(NamedTuple):
    """A policy at one step of its training, as the annotators see it."""

    arm: str
    seed: int
    step: int
    shares: list[float]  # of its summaries, by style
    exploitability: float  # what the best style wins against it: max over styles of P(style > policy) - 1/2
    interval: tuple[float, float]  # Student's, of the style that is the best on these prompts


class ExactGame(NamedTuple):
    """What theory says of the game of the three styles, [3] each."""

    nash: np.ndarray  # without regularisation
    mixture: np.ndarray  # the regularised Nash policy at tau / (1 - beta): what Nash-MD's mixture becomes
    policy: np.ndarray  # the policy with that mixture


def solve_game(masses: Sequence[float], post: str, sft: Sequence[float]) -> ExactGame:
    """Returns the exact solutions; the reference is ``sft``'s shares of the three styles.

    Where every style is written in many ways, all of them win alike, so that the policy of a style is in proportion to
    the reference's. The mixture is here one of whole responses.
    """
    styled = [post_world.styled_summary(read_post(post), style) for style in STYLES]
    p = [[post_world.annotators_prefer(masses, post, a, b) for b in styled] for a in styled]
    mu = np.maximum(sft, 1e-3) / np.sum(np.maximum(sft, 1e-3))
    game = games.from_matrix(p, mu, tau=TAU / (1 - BETA))
    mixture = solve.regularised_nash(game).policy[0]
    policy = (mixture / mu**BETA) ** (1 / (1 - BETA))
    return ExactGame(solve.nash(game).policy[0], mixture, policy / policy.sum())


def read_point(masses: Sequence[float], name: str, prompts: Sequence[str], replies: Sequence[str]) -> Point:
    """Returns what annotators see in a policy's replies; the name is "arm seed step"."""
    arm, seed, step = name.split()
    styles = [post_world.style_of(x, y) for x, y in zip(prompts, replies, strict=True)]
    shares = [styles.count(style) / len(styles) for style in STYLES]
    best = best_style_wins(masses, prompts, replies) - 0.5
    return Point(arm, int(seed), int(step), shares, float(best.mean()), mean_interval(best, (-0.5, 0.5)))


def best_style_wins(masses: Sequence[float], prompts: Sequence[str], replies: Sequence[str]) -> np.ndarray:
    """Returns P(summary of one style > reply) for each prompt [N], of the style that wins most over these replies."""
    pairs = list(zip(prompts, replies, strict=True))
    styled = [[post_world.styled_summary(read_post(x), style) for x in prompts] for style in STYLES]
    wins = [
        [post_world.annotators_prefer(masses, x, best, y) for best, (x, y) in zip(texts, pairs, strict=True)]
        for texts in styled
    ]
    return np.array(max(wins, key=sum))


def total_variation(shares: Sequence[float], policy: np.ndarray) -> float:
    """Returns the total variation between shares of three styles and a policy over them; what is missing is neither."""
    return float(0.5 * (np.abs(np.subtract(shares, policy)).sum() + 1 - np.sum(shares)))


def course(prompts: Sequence[str], replies: Mapping[str, Sequence[str]], masses: Sequence[float]) -> aj.Finding:
    """Returns the styles and the exploitability of every policy over its training, beside the exact game."""
    points = [read_point(masses, name, prompts, texts) for name, texts in replies.items()]
    exact = solve_game(masses, prompts[0], points[0].shares)
    last = max(point.step for point in points)
    rows = [[f"exact: {name}", "", *map(_three, policy), "", ""] for name, policy in exact._asdict().items()]
    for p in points:
        if p.step in (0, last):
            distance = _three(total_variation(p.shares, exact.nash))
            low, high = map(_three, p.interval)
            rows.append(
                [f"{p.arm}", str(p.seed), *map(_three, p.shares), distance, f"{p.exploitability:.3f} [{low}, {high}]"]
            )
    mean = {
        arm: np.mean([p.exploitability for p in points if p.step == last and p.arm == arm])
        for arm in ("rlhf", "nash_md")
    }
    text = (
        f"## The styles of the policies after {last} steps\n\n"
        + markdown_table(["policy", "seed", *STYLES, "distance to Nash", "exploitability"], rows)
        + f"\nMean exploitability: rlhf {mean['rlhf']:.3f}, nash_md {mean['nash_md']:.3f}, "
        f"{mean['rlhf'] / max(mean['nash_md'], 1e-9):.1f} times as much.\n"
    )
    numbers = {"points": [p._asdict() for p in points], "exact": {k: v.tolist() for k, v in exact._asdict().items()}}
    return aj.Finding(text, {"styles": draw_course(points, exact)}, numbers)


def _three(value: float) -> str:
    return f"{value:.3f}"


def draw_course(points: Sequence[Point], exact: ExactGame) -> Figure:
    """Returns a panel for each style's share over training, and one for the exploitability."""
    figure = Figure(figsize=(12, 3), layout="constrained")
    axes = figure.subplots(1, 4)
    start, curves = points[0], itertools.groupby(points[1:], key=lambda point: (point.arm, point.seed))
    for (arm, seed), group in curves:
        line = [start, *group]
        steps, label = [point.step for point in line], arm if seed == 0 else None
        style = {"color": {"rlhf": "C3", "nash_md": "C0"}[arm], "linewidth": 1.2}
        for i, axis in enumerate(axes[:3]):
            axis.plot(steps, [point.shares[i] for point in line], label=label, **style)
        axes[3].plot(steps, [point.exploitability for point in line], label=label, **style)
    for i, name in enumerate(STYLES):
        axes[i].axhline(exact.nash[i], color="k", linestyle="--", linewidth=0.8, label="exact Nash")
        axes[i].set(title=f"share of {name} summaries", ylim=(-0.03, 1.03), xlabel="step")
    axes[3].axhline(0, color="k", linestyle="--", linewidth=0.8)
    axes[3].set(title="exploitability", xlabel="step")
    axes[0].legend(fontsize=8)
    return figure
