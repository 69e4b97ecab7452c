"""The sweep of the gap and the paper's tables: closed forms against sampling, cells against what a run wrote."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.labeling.accuracy import rlaif_accuracy, rlcd_accuracy
from alignjax.labeling.statistics import JudgedPairs
from alignjax.pipeline import results
from alignjax.pipeline.config import load, load_module
from alignjax.pipeline.run import run
from alignjax.tasks import sandbox
from alignjax.tasks.sandbox_grammar import harmless_score
from alignjax.tasks.task import oracle_from_score
from alignjax.training.data import read_pairs

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "rlcd"
GAP, TABLES = EXPERIMENTS / "gap.py", EXPERIMENTS / "tables.py"
ASKED = "Human: How can I fix my garden?\n\nAssistant:"
ORACLE = oracle_from_score(harmless_score)


@pytest.fixture(scope="module")
def gap():
    return load_module(GAP)


@pytest.fixture(scope="module")
def tables():
    return load_module(TABLES)


def scores(mean, sharpness, count, seed):
    """The oracle's scores of replies that the world writes."""
    rng, world = np.random.default_rng(seed), sandbox.World(sharpness=sharpness)
    texts = (sandbox.sample_reply(world, ASKED, {"harmless": mean}, rng) for _ in range(count))
    return np.array([harmless_score(ASKED, text) for text in texts])


@pytest.mark.parametrize(("mean", "sharpness"), [(0.0, 2.0), (1.5, 2.0), (-0.5, 1.0)])
def test_the_law_of_scores_is_that_of_the_world(gap, mean, sharpness):
    law, drawn = gap.score_law(mean, sharpness), scores(mean, sharpness, 4000, 0)
    assert law.sum() == pytest.approx(1, abs=1e-12)
    for value, p in zip(np.arange(-12, 13) / 12, law, strict=True):
        found = np.mean(np.abs(drawn - value) < 1e-9)
        assert abs(found - p) < 4 * np.sqrt(p * (1 - p) / 4000) + 1e-9
    np.testing.assert_allclose(law, gap.score_law(-mean, sharpness)[::-1], atol=1e-12)


@pytest.mark.parametrize("distance", [0.0, 1.0, 3.0])
def test_the_accuracy_of_a_perfect_writer_is_what_the_oracle_counts(gap, distance):
    a, b = scores(distance / 2, 2.0, 3000, 1), scores(-distance / 2, 2.0, 3000, 2)
    decided = np.abs(a - b) > 1e-9
    want = gap.oracle_accuracy(distance, 2.0)
    assert abs(np.mean((a > b)[decided]) - want) < 4 * np.sqrt(want * (1 - want) / decided.sum())
    assert abs(want - rlcd_accuracy(distance)) < 0.005  # three sentences tell the order about as well as the quality


def simulated(gaps, count, seed):
    """RLCD's and RLAIF's pairs by perfect writers, judged by the oracle; the rater errs in one label of five."""
    rng, world, rows, plain = np.random.default_rng(seed), sandbox.World(), [], []
    for affix, distance in enumerate(gaps):
        for _ in range(count):
            sides = [sandbox.sample_reply(world, ASKED, {"harmless": s * distance / 2}, rng) for s in (1, -1)]
            swapped = int(rng.random() < 0.5)
            first, second = sides[::-1] if swapped else sides
            rows.append({"prompt": ASKED, "first": first, "second": second, "p": 1.0 - swapped, "affix": affix,
                         "positive": swapped})  # fmt: skip
            first, second = (sandbox.sample_reply(world, ASKED, {}, rng) for _ in range(2))
            p = abs(ORACLE(ASKED, first, second) - (rng.random() < 0.2))
            plain.append({"prompt": ASKED, "first": first, "second": second, "p": 0.1 + 0.8 * p, "affix": affix,
                          "positive": -1})  # fmt: skip
    judged = [np.array([ORACLE(ASKED, row["first"], row["second"]) for row in side]) for side in (rows, plain)]
    return {"RLCD": JudgedPairs(rows, judged[0]), "RLAIF": JudgedPairs(plain, judged[1])}


def test_the_study_finds_the_gaps_the_level_and_where_the_order_turns(gap):
    gaps = (0.0, 0.8, 2.0, 4.0)
    finding = gap.gap_study(simulated(gaps, 500, 3), "the oracle", gaps, 2.0)
    for point, distance in zip(finding.numbers["gaps"], gaps, strict=True):
        assert point["gap"] == distance and point["pairs"] == 500
        right = point["right"]
        assert right["low"] - 0.01 < gap.oracle_accuracy(distance, 2.0) < right["high"] + 0.01
        assert point["shown"] == pytest.approx(distance, abs=0.3)
        assert point["ties"] == pytest.approx(1 - right["n"] / 500)
    assert finding.numbers["rlaif"]["value"] == pytest.approx(0.8, abs=0.03)
    turns = finding.numbers["turns"]
    assert rlcd_accuracy(turns["by App. N"]) == pytest.approx(rlaif_accuracy(), abs=1e-3)
    assert turns["by App. N's RLCD at the measured RLAIF"] == pytest.approx(1.19, abs=0.15)
    assert turns["measured"] == pytest.approx(1.19, abs=0.35)
    assert f"measured {turns['measured']:.2f}" in finding.text and list(finding.pictures) == ["accuracy"]


def test_a_crossing_is_where_the_line_between_two_points_meets_the_level(gap):
    x, y = np.array([0.0, 1.0, 3.0]), np.array([0.5, 0.6, 0.9])
    assert gap.crossing(x, y, 0.75) == pytest.approx(2.0) and gap.crossing(x, y, 0.95) is None


def test_pairs_that_are_not_there_are_no_crash(gap):
    arms = simulated((1.0,), 4, 0)
    finding = gap.gap_study(arms, "the oracle", (1.0, 2.0), 2.0)
    assert finding.numbers["gaps"][1] == {
        "gap": 2.0, "pairs": 0, "ties": None, "shown": None,
        "right": {"value": None, "low": 0.0, "high": 1.0, "n": 0},
    }  # fmt: skip
    assert "measured" not in finding.numbers["turns"] and "accuracy" in finding.pictures


def test_the_default_corpus_is_what_it_was_before_worlds_had_gaps():
    """To the bit: published figures depend on it."""
    small = {"nouns": 8, "verbs": 6, "two_turns": 0.0}
    for world, start in ((sandbox.World(), "37869afd49568daba927da0e8515fda7"),
                         (sandbox.World(**small), "2711e7be44217b2bb0559e51b5f803d4")):  # fmt: skip
        corpus = json.dumps(sandbox.sandbox_corpus(world, 300, 7)).encode()
        assert hashlib.sha256(corpus).hexdigest()[:32] == start
    assert sandbox.sandbox_corpus(sandbox.World(gaps=(2.0,) * 4), 300, 7) == sandbox.sandbox_corpus(
        sandbox.World(), 300, 7
    )


def test_each_affix_pair_of_a_world_shows_its_own_gap():
    gaps = (4.0, 0.0, 2.0, 2.0, 1.0, 3.0)
    world = sandbox.World(gaps=gaps, rater=0.0, two_turns=0.0, affixed=1.0)
    task = sandbox.sandbox_task(world)
    assert len(task.affixes) == len(task.questions) == 6 and len({a for pair in task.affixes for a in pair}) == 12
    found = {}
    for document in sandbox.sandbox_corpus(world, 6000, 0):
        prompt, _, rest = document.partition("\n\nAssistant ")
        affix, _, reply = rest.removesuffix("\n\nHuman:").partition(": ")
        found.setdefault(affix, []).append(harmless_score(prompt + "\n\nAssistant:", reply))
    module = load_module(GAP)
    for (plus, minus), distance in zip(task.affixes, gaps, strict=True):
        for affix, sign in ((plus, 1), (minus, -1)):
            mean = module.score_law(sign * distance / 2, 2.0) @ np.linspace(-1, 1, 25)
            assert abs(np.mean(found[affix]) - mean) < 4 * np.std(found[affix]) / np.sqrt(len(found[affix])), affix
    assert sandbox.sandbox_task(world, "helpful").affixes == sandbox.SANDBOX_AFFIXES["helpful"]


@pytest.mark.parametrize(("gaps", "words"), [((1.0,) * 7, "7 gaps and there are 6 affix pairs"), ((-1.0,), "gaps=")])
def test_gaps_out_of_range_are_refused(gaps, words):
    with pytest.raises(UserError, match=words):
        sandbox.World(gaps=gaps)


def test_the_sweep_is_wired_to_the_gaps_of_its_world():
    for small in ("False", "True"):
        experiment = load(GAP, {"small": small})
        study, world = experiment.stages["gap"], experiment.task.source
        assert study.function.keywords == {"gaps": world.gaps, "sharpness": world.sharpness}
        assert len(experiment.task.affixes) == len(world.gaps) == 6
        rlcd, rlaif = (experiment.stages[study.pairs[name]] for name in ("RLCD", "RLAIF"))
        assert type(rlcd.method).__name__ == "RLCD" and rlaif.method.judge.stage == rlaif.generator == rlcd.generator


def test_the_short_sweep_counts_every_pair_once(tmp_path):
    run(load(GAP, {"small": "True"}), tmp_path)
    numbers = json.loads((tmp_path / "gap" / "numbers.json").read_text())
    figures = {
        n: json.loads((tmp_path / n / "stage.json").read_text())["figures"] for n in ("rlcd_pairs", "rlaif_pairs")
    }
    rows, points = read_pairs(tmp_path / "rlcd_pairs" / "data", "train"), numbers["gaps"]
    assert [point["pairs"] for point in points] == [sum(row["affix"] == i for row in rows) for i in range(6)]
    rlcd, rlaif = figures["rlcd_pairs"], figures["rlaif_pairs"]
    decided = sum(point["right"]["n"] for point in points)
    right = sum(point["right"]["value"] * point["right"]["n"] for point in points if point["right"]["n"])
    assert decided == round(rlcd["pairs"] * (1 - rlcd["oracle_ties"])) > 10
    assert right / decided == pytest.approx(rlcd["label_accuracy"])
    assert numbers["rlaif"]["value"] == pytest.approx(rlaif["label_accuracy"])
    assert (tmp_path / "gap-accuracy.png").read_bytes().startswith(b"\x89PNG")


def write_run(folder, task="sandbox-harmless", judge="oracle"):
    """A work folder as a finished run leaves it: a base, a tournament, pairs that were studied, an agreement."""
    names, n = ["base", "rlcd", "rlaif"], 200
    rate = np.array([[0.5, 0.2, 0.3], [0.8, 0.5, 0.625], [0.7, 0.375, 0.5]])
    table = {"judge": judge, "policies": names, "n": n, "win_rate": rate.tolist(), "low": (rate - 0.1).tolist(),
             "high": (rate + 0.05).tolist(), "mean_length": [20.0, 17.5, 30.0],
             "kl_to_reference": [0.0, None, 2.5]}  # fmt: skip
    share = {"value": 0.75, "low": 0.7, "high": 0.8, "n": 90}
    measured = {"accuracy": 0.525, "low": 0.4, "high": 0.6, "n": 80, "mean_probability": 0.51,
                "probability_low": 0.5, "probability_high": 0.52}  # fmt: skip
    stages = {
        "base": ({"kind": "Pretrain"}, {"parameters": 947_136}, None, None),
        "table": ({"kind": "Tournament"}, {}, "win_rates.json", [table]),
        "labels": ({"kind": "PairStudy", "judge": {"name": "oracle"}}, {}, "numbers.json",
                   {"arms": {"RLCD": {"accuracy": share}}, "agreement": {}}),
        "agreed": ({"kind": "MeasureAgreement"}, {}, "numbers.json", {"pairs": "human", "models": {"RLCD": measured}}),
    }  # fmt: skip
    for name, (config, figures, file, content) in stages.items():
        (folder / name).mkdir(parents=True)
        record = {"finished": True, "config": config, "figures": figures, "task": {"name": task}}
        (folder / name / "stage.json").write_text(json.dumps(record))
        if file:
            (folder / name / file).write_text(json.dumps(content))
    return folder


def cells(finding):
    """Yields each row of ours as {column number: cell} without the empty ones."""
    return [{i: cell for i, cell in enumerate(row) if cell} for row in finding.numbers["rows"] if "ours" in row[1]]


def table(folder, name, **settings):
    """Returns what a table finds in a work folder."""
    return load(TABLES, {"run": str(folder), **settings}).stages[name].function()


def test_table_3_has_rlcd_s_share_of_each_comparison_under_its_own_column(tmp_path):
    write_run(tmp_path / "harmless")
    base, rlaif, distilled = cells(table(tmp_path / "harmless", "table3"))
    assert base == {
        0: "base, by rlcd",
        1: "ours, base 947.1K",
        2: "oracle (n=200)",
        3: "80.0/20.0 [70.0, 85.0]",
        7: "17.5/20.0",
    }
    assert (rlaif[0], rlaif[3], rlaif[7]) == ("rlaif, by rlcd", "62.5/37.5 [52.5, 67.5]", "17.5/30.0")
    assert distilled == {0: "Context-Dist", 1: "ours"}  # the run has no such policy
    assert cells(table(tmp_path / "harmless", "table6")) == [{0: "RLCD-Rescore", 1: "ours"}]
    (turned, *_) = cells(table(tmp_path / "harmless", "table3", rlcd="rlaif"))
    assert turned[3].startswith("70.0/30.0")
    for task, judge, column in (("dialogue-helpful", "x", 5), ("outline", "x", 6), ("dialogue-harmless", "help", 4)):
        write_run(tmp_path / task, task, judge)
        assert cells(table(tmp_path / task, "table3"))[0][column] == "80.0/20.0 [70.0, 85.0]"
    both = cells(table(f"{tmp_path / 'harmless'},{tmp_path / 'outline'}", "table3"))
    assert [row[0] for row in both] == ["base, by rlcd"] * 2 + ["rlaif, by rlcd"] * 2 + ["Context-Dist"]
    write_run(tmp_path / "stories", "stories-girl")
    assert all(row[1] == "ours" for row in cells(table(tmp_path / "stories", "table3")))


def test_tables_5_and_36_have_the_run_s_figures_under_its_attribute(tmp_path):
    write_run(tmp_path / "harm"), write_run(tmp_path / "help", "sandbox-helpful")
    for name, column in (("harm", 3), ("help", 5)):
        (row,) = cells(table(tmp_path / name, "table5"))
        assert row == {0: "RLCD", 1: "ours, base 947.1K", 2: "human (n=80)", column: "52.5 [40.0, 60.0]",
                       column + 1: "0.510 [0.500, 0.520]"}  # fmt: skip
    for name, column in (("harm", 3), ("help", 4)):
        (row,) = cells(table(tmp_path / name, "table36"))
        assert row == {0: "RLCD", 1: "ours, base 947.1K", 2: "oracle (n=90)", column: "0.750 [0.700, 0.800]"}


def test_without_a_run_ours_is_empty_and_the_paper_s_shares_sum_up(tables):
    stages = load(TABLES, {}).stages
    for name in ("table2", "table3", "table5", "table6", "table36"):
        finding = stages[name].function()
        assert all(not row.keys() - {0, 1} for row in cells(finding))
        assert "2307.12950v3" in finding.text and ("GPT-4" in finding.text) == (name in ("table3", "table6"))
    for paper, total in ((tables.TABLE_2, 9), (tables.TABLE_3, 100), (tables.TABLE_6, 100)):
        shares = [cell for row in paper.values() for cell in row[:4] if cell]
        assert len(shares) > 7 and all(sum(map(float, cell.split("/"))) == pytest.approx(total) for cell in shares)


def test_the_closed_forms_round_to_the_paper_s_figures(tables):
    rows = {row[0]: row[1:] for row in load(TABLES, {}).stages["appendix_n"].function().numbers["rows"]}
    known = {what: (paper, float(here)) for what, (paper, here) in rows.items() if paper}
    assert [paper for paper, _ in known.values()] == ["0.75", "0.528", "0.574"]
    assert all(abs(float(paper) - here) < 0.5 * 10 ** -len(paper.split(".")[1]) for paper, here in known.values())


def test_one_command_prints_one_table_and_follows_the_run(tmp_path, capfd):
    folder = write_run(tmp_path / "run")
    command = ["run", str(TABLES), "--workdir", str(tmp_path / "t"), "--only", "table3", "--set", f"run={folder}"]
    assert main(command) == 0
    out = capfd.readouterr().out
    assert out.count("## ") == 1 and "80.0/20.0 [70.0, 85.0]" in out and "## Table 3" in out
    file = folder / "table" / "win_rates.json"
    file.write_text(file.read_text().replace("0.8", "0.9"))
    assert main(command) == 2 and "digest" in capfd.readouterr().err
    assert main([*command, "--redo"]) == 0 and "90.0/10.0" in capfd.readouterr().out


def test_a_folder_without_a_finished_stage_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no finished stage"):
        results.RunResults(str(tmp_path))
    write_run(tmp_path)
    (tmp_path / "labels" / "stage.json").write_text(json.dumps({"finished": False, "config": {"kind": "PairStudy"}}))
    assert list(results.RunResults(str(tmp_path)).records()) == ["agreed", "base", "table"]
