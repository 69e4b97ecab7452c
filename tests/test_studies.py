"""Studies: experiments of exact mathematics, run and reported as other experiments are."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.pipeline.config import load_module
from alignjax.pipeline.run import run

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
THEORY, DIVERSITY = (EXPERIMENTS / "nlhf" / f"{name}.py" for name in ("theory", "diversity"))


def test_the_worked_examples_are_the_papers(tmp_path):
    assert main(["run", str(THEORY), "--workdir", str(tmp_path), "--only", "examples"]) == 0
    rows = json.loads((tmp_path / "examples" / "numbers.json").read_text())
    assert len(rows) == 10
    for what, paper, here in rows:
        assert here == pytest.approx(paper, abs=1e-10), what
    assert "50/99" not in (text := (tmp_path / "examples" / "section.md").read_text()) and f"{50 / 99:.12f}" in text


def test_nash_moves_smoothly_where_the_reward_optimum_flips(tmp_path, capfd):
    assert main(["run", str(DIVERSITY), "--workdir", str(tmp_path), "--set", "diversity.function.points=5"]) == 0
    rows = json.loads((tmp_path / "diversity" / "numbers.json").read_text())
    for epsilon, nash, _, best in rows:
        np.testing.assert_allclose(nash, [1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon], atol=1e-9)
        if abs(epsilon) > 1e-9:
            assert best == ([1, 0, 0] if epsilon > 0 else [0, 1, 0])
    assert "Bradley-Terry optimum" in capfd.readouterr().out
    assert (tmp_path / "diversity-policies.png").read_bytes().startswith(b"\x89PNG")
    assert "](diversity-policies.png)" in (tmp_path / "report.md").read_text()


def test_a_race_counts_evaluations_and_says_where_a_claim_is_broken():
    theory = load_module(THEORY)
    with jax.enable_x64(True):
        games = {"cycle": theory.zoo.cycle(reference=theory.MU, tau=0.1)}
        arms = {
            "true": (theory.dynamics.egpo(0.3), lambda t, tau, start: start * (1 - 0.03) ** t),
            "false": (theory.dynamics.egpo(0.3), lambda t, tau, start: start * 0.5**t),
        }
        finding = theory.race(games, arms, evaluations=100, records=8)
    kept, broken = (line for line in finding.text.splitlines() if "| cycle" in line)
    assert "kept" in kept and "BROKEN" in broken
    assert finding.numbers["cycle/true"]["evaluations"][-1] == 100  # fifty steps of two each


def test_an_experiment_without_a_task_says_so_to_a_stage_that_needs_one(tmp_path):
    quickstart = load_module(EXPERIMENTS / "quickstart.py").get_config(small=True)
    experiment = load_module(THEORY).get_config().with_stages(base=quickstart.stages["base"])
    with pytest.raises(UserError, match="'base' needs a task"):
        run(experiment, tmp_path, only=["base"])
