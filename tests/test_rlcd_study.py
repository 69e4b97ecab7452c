"""The study of RLCD in the small world, in its short form: what each arm is made from, and what its table holds."""

import dataclasses

import pytest

from alignjax.distributed import storage
from alignjax.pipeline import config
from alignjax.pipeline.experiment import ancestors
from alignjax.pipeline.run import run
from alignjax.training import data
from tests.conftest import ROOT

FILE = ROOT / "experiments" / "rlcd" / "sandbox.py"
SHORT = {"small": "True", "table.prompts": "16", "rlcd_pairs.prompts": "64"}
SHORT |= {"rlaif_pairs.prompts": "64", "truth.prompts": "64"}
SHOWN = ["base", "distilled", "rlcd"]
POLICIES = ["base", "distilled", "rlaif", "rescore", "rlcd", "nash_md", "gradient"]


def test_the_arms_differ_in_their_labels_or_in_their_optimiser_alone():
    stages = config.load(FILE, {}).stages
    for arm in ("rlaif", "rescore"):
        assert stages[f"{arm}_reward"] == dataclasses.replace(stages["rlcd_reward"], pairs=f"{arm}_pairs")
        assert stages[arm].critic.start == stages[arm].data.preference == f"{arm}_reward"
        assert (
            dataclasses.replace(stages[arm], critic=stages["rlcd"].critic, data=stages["rlcd"].data) == stages["rlcd"]
        )
    pairs = dataclasses.replace(stages["rlaif_pairs"], method=stages["rlcd_pairs"].method)
    assert pairs == stages["rlcd_pairs"] and stages["rescore_pairs"].pairs == stages["distilled"].pairs == "rlcd_pairs"
    batches = {(stages[name].loop.steps, stages[name].loop.batch) for name in ("rlcd", "nash_md", "gradient")}
    assert len(batches) == 1 and stages["gradient"].data.preference == "rlcd_reward"
    assert stages["table"].policies == {name: name for name in POLICIES}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A run of what labels, and of two of the arms: the others compile the same programs again."""
    folder, loops = tmp_path_factory.mktemp("study"), {"rlcd": "2", "distilled": "2", "rlcd_reward": "4"}
    whole = config.load(FILE, SHORT | {f"{name}.loop.steps": steps for name, steps in loops.items()})
    table = dataclasses.replace(whole.stages["table"], policies={name: name for name in SHOWN})
    stages = {**whole.stages, "table": table}
    wanted = ancestors(stages, ["table", "labels"])
    run(dataclasses.replace(whole, stages={n: stage for n, stage in stages.items() if n in wanted}), folder)
    return folder


def test_rescore_labels_the_replies_of_rlcd_and_rlaif_has_its_own(study):
    def replies(name):
        return {(row["prompt"], row["first"], row["second"]) for row in data.read_pairs(study / name / "data", "train")}

    assert replies("rescore_pairs") <= replies("rlcd_pairs")
    prompts = [{row[0] for row in replies(name)} for name in ("rlcd_pairs", "rlaif_pairs")]
    assert prompts[0] == prompts[1] and replies("rlaif_pairs") != replies("rlcd_pairs")
    assert {row["p"] for row in data.read_pairs(study / "rlcd_pairs" / "data", "train")} == {0.0, 1.0}
    assert any(0 < row["p"] < 1 for row in data.read_pairs(study / "rlaif_pairs" / "data", "train"))


def test_the_table_has_its_arms_and_the_labels_their_card(study):
    table = storage.read_json(study / "table" / "win_rates.json")[0]
    assert table["policies"] == SHOWN and len(table["win_rate"]) == len(SHOWN) and table["n"] == 16
    for i in range(len(SHOWN)):
        assert table["low"][i][0] <= table["win_rate"][i][0] <= table["high"][i][0]
    card = storage.read_json(study / "labels" / "numbers.json")["arms"]
    assert (
        list(card) == ["RLCD", "RLAIF", "Rescore"] and card["RLCD"]["confidence"] == 1.0 > card["RLAIF"]["confidence"]
    )
    assert (study / "table-score.png").stat().st_size > 1000
