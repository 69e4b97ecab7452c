"""Nash preserves diversity where a reward does not (2312.00886, section 3.2).

    alignjax run experiments/nlhf/diversity.py --workdir runs/diversity

Three types of annotators have masses 1/3 - eps, 1/3 + eps/2, 1/3 + eps/2, and their majority is a cycle. Over eps, the
Nash policy moves smoothly. The best policy under the Bradley-Terry rewards that fit the same preferences puts
everything on one answer and flips at eps = 0. It takes seconds.
"""

from functools import partial

import numpy as np
from matplotlib.figure import Figure

import alignjax as aj
from alignjax.games import solve, zoo
from alignjax.reporting.tables import markdown_table


def sweep(points: int, tau: float) -> aj.Finding:
    """Returns Nash, regularised Nash and the Bradley-Terry optimum at ``points`` values of eps inside [-1/3, 1/3]."""
    if points < 1:
        raise aj.UserError(f"points={points} must be at least 1")
    rows, policies = [], []
    for epsilon in np.linspace(-1 / 3, 1 / 3, points + 2)[1:-1]:
        played = zoo.diversity(epsilon, tau=tau)
        rewards = zoo.bradley_terry_rewards(played, played.log_mu)[0]
        best = np.isclose(rewards, rewards.max(), atol=1e-9) / np.isclose(rewards, rewards.max(), atol=1e-9).sum()
        nash, soft = solve.nash(played).policy[0], solve.regularised_nash(played).policy[0]
        policies.append((epsilon, nash, soft, best))
        written = [" ".join(f"{p:.3f}" for p in policy) for policy in (nash, soft, best)]
        rows.append([f"{epsilon:+.3f}", *written, " ".join(f"{r:+.3f}" for r in rewards)])
    epsilons, *columns = (np.array(column) for column in zip(*policies, strict=True))
    titles = ("Nash", f"regularised Nash, tau={tau}", "Bradley-Terry optimum")
    picture = Figure(figsize=(10, 3), layout="constrained")
    for axis, title, policy in zip(picture.subplots(1, 3, sharey=True), titles, columns, strict=True):
        axis.plot(epsilons, policy, label=["y1", "y2", "y3"])
        axis.set(title=title, xlabel="eps", ylim=(-0.03, 1.03))
        axis.legend()
    text = markdown_table(["eps", *titles, "rewards"], rows)
    return aj.Finding(
        f"## Diversity\n\n{text}", {"policies": picture}, [[float(row[0]), *map(list, row[1:])] for row in policies]
    )


def get_config() -> aj.Experiment:
    """Returns the study."""
    return aj.Experiment(task=None, stages={"diversity": aj.Study(partial(sweep, points=33, tau=0.1))})
