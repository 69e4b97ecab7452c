"""Ratings of files, of a finished tournament and by a stage: what is read, what is said, what is refused."""

import csv
import dataclasses
import io
import itertools
import json
from typing import ClassVar

import numpy as np
import pytest

import alignjax as aj
from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.fields import Kind, stage_inputs
from alignjax.games import zoo
from alignjax.pipeline.experiment import Exposure
from alignjax.pipeline.run import run
from alignjax.preferences.rating_intervals import rate_fully
from alignjax.preferences.ratings import make_pool, pool_of_votes, rate_pool
from alignjax.reporting.pools import read_pools
from alignjax.reporting.rating_report import rating_numbers, rating_picture, rating_section
from tests.test_cli import refused
from tests.test_ratings import LETTERS, LIMIT, general_fit, pool, votes_of

CYCLE = [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]
CSV = ",rock,paper,scissors\nrock,,0.1,0.8\npaper,0.9,-,0.1\nscissors,0.2,0.9,0.5\n"


def write_tournament(folder, votes, names=("mine", "base", "third"), judge="oracle", damage=None):
    """Writes what a Tournament keeps, with soft probabilities behind the votes."""
    folder.mkdir(parents=True, exist_ok=True)
    soft = 0.5 + (votes - 0.5) * 0.6
    pairs = [(i, j) for i in range(len(names)) for j in range(i)]
    rows = [{"policy": names[i], "other": names[j], "probability": soft[i, j].tolist()} for i, j in pairs]
    table = {"judge": judge, "policies": list(names), "n": votes.shape[-1], "win_rate": votes.mean(-1).tolist()}
    table["mean_probability"] = soft.mean(-1).tolist()
    if damage:
        damage(table, rows)
    (folder / "win_rates.json").write_text(json.dumps([table]))
    (folder / f"judgments-{judge}.json").write_text(json.dumps(rows))
    return folder


def rated(capfd, tmp_path, source, *options):
    """The screen and the JSON of ``alignjax rate``."""
    out = tmp_path / "out.json"
    assert main(["rate", str(source), "--json", str(out), *options]) == 0
    return capfd.readouterr().out, json.loads(out.read_text())


def test_the_command_rates_a_csv_matrix(capfd, tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    text, (found,) = rated(capfd, tmp_path, tmp_path / "a.csv")
    np.testing.assert_allclose(found["lottery"]["mass"], np.array([4, 3, 4]) / 11)
    assert found["policies"] == ["rock", "paper", "scissors"]
    np.testing.assert_allclose(found["win_rate"], CYCLE, atol=1e-15)
    assert found["bootstrap"] is None and "the number of comparisons is not known" in text
    [triple] = found["cyclic_triples"]
    assert triple["policies"] == ["rock", "scissors", "paper"] and triple["weakest"] == pytest.approx(0.8)
    assert triple["links"] == pytest.approx([0.8, 0.9, 0.9])
    for words in (
        "## Ratings of the pool, a.csv",
        "| rock > scissors > paper > rock | 0.800        | rock > scissors |",
        "1 of the 1 triples without a tie",
        "There is no Condorcet winner",
        "paper passes scissors",
    ):
        assert words in text, words
    rows = {line.split()[1]: line.split() for line in text.splitlines()[::-1] if line.startswith("|")}
    elo = [f"{value:+.0f}" for value in found["elo"]]
    assert rows["rock"][3::2] == ["0.364", "0.000", elo[0], "0.400", "paper"]
    assert rows["scissors"][3::2] == ["0.364", "0.000", elo[2], "0.300", "rock"]


def test_the_command_rates_json_with_counts(capfd, tmp_path):
    value = {"policies": ["a", "b", "c"], "win_rate": CYCLE, "n": 50}
    (tmp_path / "m.json").write_text(json.dumps(value))
    text, (found,) = rated(capfd, tmp_path, tmp_path / "m.json", "--bootstrap", "20", "--seed", "4")
    want = rate_fully("m.json", make_pool("abc", CYCLE, 50), 20, 4)
    assert found == json.loads(json.dumps(rating_numbers(want))) and found["bootstrap"]["seed"] == 4
    assert text.rstrip() == rating_section(want).rstrip()
    assert "20 resamples of each cell on its own, as a binomial, seed 4" in text
    (tmp_path / "m.json").write_text(json.dumps({**value, "n": [[0, 9, 8], [9, 0, 7], [8, 7, 0]]}))
    text, (found,) = rated(capfd, tmp_path, tmp_path / "m.json", "--bootstrap", "0")
    assert found["bootstrap"] is None and "No intervals were asked for" in text
    np.testing.assert_allclose(found["bradley_terry"], general_fit(np.array(CYCLE), np.array(
        [[0, 9, 8], [9, 0, 7], [8, 7, 0]]), 0), atol=1e-5)  # fmt: skip


def test_the_command_rates_a_tournament_by_the_votes_of_its_prompts(capfd, tmp_path):
    votes = votes_of(2, 3, 30)
    folder = write_tournament(tmp_path / "table", votes)
    text, (found,) = rated(capfd, tmp_path, folder, "--bootstrap", "15")
    want = rate_fully("judge: oracle", pool_of_votes(["mine", "base", "third"], votes), 15, 0)
    assert found == json.loads(json.dumps(rating_numbers(want))) and found["bootstrap"]["is_paired"]
    assert "## Ratings of the pool, judge: oracle" in text and "the prompts, the same for all cells" in text
    _, (soft,) = rated(capfd, tmp_path, folder, "--bootstrap", "0", "--probabilities")
    np.testing.assert_allclose(soft["win_rate"], 0.5 + 0.6 * (np.array(found["win_rate"]) - 0.5), atol=1e-12)
    _, (alone,) = rated(capfd, tmp_path, folder / "win_rates.json", "--bootstrap", "15")
    np.testing.assert_allclose(alone["win_rate"], found["win_rate"], atol=1e-15)
    assert not alone["bootstrap"]["is_paired"]
    assert alone["title"] == "judge: oracle" and alone["n"][0][1] == 30
    _, (soft_alone,) = rated(capfd, tmp_path, folder / "win_rates.json", "--bootstrap", "0", "--probabilities")
    np.testing.assert_allclose(soft_alone["win_rate"], soft["win_rate"], atol=1e-12)


NAMES = '{"policies": ["a", "b"], '
BAD_FILES = {
    "": "is empty",
    " \n ": "is empty",
    "a\0b": "is no text",
    b"\x89PNG\xff\xfe": "is no UTF-8 text",
    ";a;b\na;.5;.6\nb;.4;.5": "separate its cells with commas, not ';'",
    "\ta\tb\na\t.5\t.6": "its first row names no policy",
    "hello": "its first row names no policy",
    ",,\n,,": "its cells are all empty",
    ",a,b": "the first column names [] and the first row ['a', 'b']",
    ",a\na,0.5": "a pool needs two policies, and this one has 1",
    ",a,b\na,.5,.6": "names ['a'] and the first row ['a', 'b']",
    ",a,b\na,.5,.6\nb,.4": "line 3 has 2 cells and the first has 3; make it square",
    ",a,b\n\na,.5,.6\n\nb,.4": "line 5 has 2 cells and the first has 3; make it square",
    ",a,b\na,.5,.61\nb,.41,.5": "P(a > b) = 0.61 and P(b > a) = 0.41 do not sum to 1; correct one of them",
    ",a,b\na,.5,.6\nc,.4,.5": "the first column names ['a', 'c'] and the first row ['a', 'b']",
    ",a,b\na,.5,.6\nb,.5,.5": "P(a > b) = 0.6 and P(b > a) = 0.5 do not sum to 1; correct one of them",
    ",a,b\na,.5,60\nb,40,.5": "P(a > b) = 60 is not in [0, 1]; a percentage? divide by 100",
    ",a,b\na,.5,nan\nb,.5,.5": "P(a > b) = nan is not in [0, 1]",
    ",a,b\na,.5,-\nb,.5,.5": "P(a > b) is '-', which is no number",
    ",a,b\na,.6,.5\nb,.5,.5": "P(a > a) = 0.6, and a policy ties with itself; write 0.5",
    ",a,a\na,.5,.6\na,.4,.5": "two policies are named 'a'",
    ",a,\na,.5,.6\n,.4,.5": "'' is no name of a policy",
    "[]": "it holds no table",
    "[1]": 'it has no "policies"; give',
    "{": "it is no JSON",
    "[" * 20000: "nested too deeply",
    "{}": 'it has no "policies"; give',
    NAMES + '"rate": [[0.5, 0.6], [0.4, 0.5]]}': 'it has no "win_rate"; give',
    '{"policies": 3, "win_rate": [[0.5]]}': '"policies" is 3; give a list',
    '{"policies": ["a", 2], "win_rate": [[0.5, 0.6], [0.4, 0.5]]}': "2 is no name",
    NAMES + '"win_rate": [[0.5, 0.6], [0.4]]}': "has rows of different lengths",
    NAMES + '"win_rate": [[0.5, 0.6]]}': "the matrix has shape [1, 2] and there are 2 policies",
    NAMES + '"win_rate": [[0.5, true], [0.4, 0.5]]}': "holds True, which is no number",
    NAMES + '"win_rate": [[0.5, [0.6]], [[0.4], 0.5]]}': "holds [0.6], which is no number",
    NAMES + '"win_rate": [[0.5, NaN], [0.4, 0.5]]}': "P(a > b) = nan is not in [0, 1]",
    NAMES + '"win_rate": [[0.5, null], [0.4, 0.5]]}': "holds None, which is no number",
    NAMES + '"win_rate": [[0.5, 0.6], [0.4, 0.5]], "n": 0}': "n of a and b is 0; give",
    NAMES + '"win_rate": [[0.5, 0.6], [0.4, 0.5]], "n": [[1, 2], [3, 1]]}': "n of a and b is 2, the other way round 3",
    NAMES + '"win_rate": [[0.5, 0.6], [0.4, 0.5]], "n": [1, 2, 3]}': "n has shape [3]",
    NAMES + '"win_rate": [[0.5, 0.6], [0.4, 0.5]], "n": 1e400}': "n of a and b is inf",
}


@pytest.mark.parametrize(("content", "message"), BAD_FILES.items(), ids=map(repr, range(len(BAD_FILES))))
def test_a_malformed_file_is_answered_by_one_line(capfd, tmp_path, content, message):
    path = tmp_path / "pool.file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(capfd, "rate", str(path), "--json", str(tmp_path / "out.json"))
    assert message in line and str(path) in line
    assert not (tmp_path / "out.json").exists()


def test_other_mistakes_of_the_command(capfd, tmp_path):
    (tmp_path / "a.csv").write_text(CSV)
    a = str(tmp_path / "a.csv")
    assert "No such file" in refused(capfd, "rate", str(tmp_path / "none.csv"))
    assert "holds no win_rates.json; give the folder" in refused(capfd, "rate", str(tmp_path))
    assert "--bootstrap=-1 must be" in refused(capfd, "rate", a, "--bootstrap", "-1")
    assert "--seed=-1 must be" in refused(capfd, "rate", a, "--seed", "-1")
    assert "leave --probabilities out" in refused(capfd, "rate", a, "--probabilities")
    assert "in no folder that is there; name a file" in refused(capfd, "rate", a, "--json", f"{tmp_path}/no/out.json")
    assert "is a folder; name a file" in refused(capfd, "rate", a, "--json", str(tmp_path))
    assert "is the file that is read; name another" in refused(capfd, "rate", a, "--json", a)
    assert (tmp_path / "a.csv").read_text() == CSV


def test_rates_that_were_rounded_take_the_mean_of_both(tmp_path):
    (tmp_path / "a.csv").write_text(",a,b\na,,.67\nb,.34,\n")
    [(_, found)] = read_pools(tmp_path / "a.csv", soft=False)
    np.testing.assert_allclose(found.rate, [[0.5, 0.665], [0.335, 0.5]])


def test_a_csv_may_be_written_by_a_spreadsheet(tmp_path):
    """A mark of the encoding, other ends of lines, quotes, blank lines and spaces."""
    buffer = io.StringIO()
    csv.writer(buffer, quoting=csv.QUOTE_ALL).writerows(
        [["", " a, b ", "c|d"], ["a, b", " 0.5", "0.25"], [], ["c|d", "0.75 ", ""]]
    )
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + buffer.getvalue().encode())
    [(title, found)] = read_pools(tmp_path / "a.csv", soft=False)
    assert title == "a.csv" and found.policies == ("a, b", "c|d") and found.rate.tolist() == [[0.5, 0.25], [0.75, 0.5]]
    assert "| c\\|d" in rating_section(rate_fully(title, found, 0, 0))


@pytest.mark.parametrize(
    "damage",
    [
        lambda table, rows: rows.pop(),
        lambda table, rows: rows[0].update(policy="nobody"),
        lambda table, rows: rows[0].update(probability=[0.5]),
        lambda table, rows: rows[0].update(probability=[*rows[0]["probability"][1:], 2.0]),
        lambda table, rows: rows[1].update(probability=[1 - p for p in rows[1]["probability"]]),
        lambda table, rows: rows[0]["probability"].__setitem__(0, float("nan")),
        lambda table, rows: rows[0]["probability"].__setitem__(0, 1.5),
        lambda table, rows: table.pop("n"),
        lambda table, rows: table.pop("judge"),
        lambda table, rows: table.update(n="many"),
        lambda table, rows: table.update(policies=["mine", "base"]),
    ],
)
def test_judgments_that_do_not_fit_their_table_are_refused(capfd, tmp_path, damage):
    folder = write_tournament(tmp_path / "table", votes_of(2, 3, 30), damage=damage)
    assert "do not fit win_rates.json; remove it" in refused(capfd, "rate", str(folder))


def test_missing_judgments_and_a_lonely_policy_are_named(capfd, tmp_path):
    folder = write_tournament(tmp_path / "table", votes_of(2, 3, 30))
    (folder / "judgments-oracle.json").unlink()
    assert "judgments-oracle.json is missing or damaged" in refused(capfd, "rate", str(folder))
    lonely = write_tournament(tmp_path / "one", np.full((1, 1, 4), 0.5), names=("mine",))
    assert "one: a pool needs two policies, and this one has 1" in refused(capfd, "rate", str(lonely))
    (folder / "win_rates.json").write_text("{}")
    assert "do not fit" in refused(capfd, "rate", str(folder))


# The stage


@dataclasses.dataclass(frozen=True)
class Table:
    """A stage in the place of a tournament, of two judges."""

    makes: ClassVar[Kind] = Kind.TABLES
    meanings: ClassVar[dict] = {}

    def network(self, context):
        return None

    def exposure(self, context):
        return Exposure()

    def check(self, context):
        pass

    def programs(self, context):
        return ()

    def run(self, context, programs):
        for seed, judge in enumerate(("one", "two")):
            write_tournament(context.folder, votes_of(seed, 3, 30), judge=judge)
            tables = json.loads((context.folder / "win_rates.json").read_text())
            (context.folder / f"{judge}.part").write_text(json.dumps(tables))
        parts = [json.loads((context.folder / f"{judge}.part").read_text())[0] for judge in ("one", "two")]
        (context.folder / "win_rates.json").write_text(json.dumps(parts))
        return {}


def test_the_stage_rates_every_judge_of_the_table_and_nothing_else(tmp_path):
    stage = aj.RatePool(table="table", bootstrap=12)
    assert [name for _, name, _ in stage_inputs(stage)] == ["table"] and stage.programs(None) == ()
    assert stage.exposure(None) == Exposure() and stage.network(None) is None
    experiment = aj.Experiment(None, {"table": Table(), "ratings": stage}, seed=3)
    run(experiment, tmp_path)
    found = json.loads((tmp_path / "ratings" / "numbers.json").read_text())
    names = ["mine", "base", "third"]
    for number, (seed, judge) in enumerate(((0, "one"), (1, "two"))):
        measured = pool_of_votes(names, votes_of(seed, 3, 30))
        want = rate_fully(f"judge: {judge}", measured, 12, found[number]["bootstrap"]["seed"])
        assert found[number] == json.loads(json.dumps(rating_numbers(want)))
        assert rating_section(want) in (report := (tmp_path / "report.md").read_text())
        assert f"![{judge}](ratings-{judge}.png)" in report
        assert (tmp_path / f"ratings-{judge}.png").read_bytes().startswith(b"\x89PNG")
    soft = dataclasses.replace(stage, probabilities=True, seed=1)
    run(experiment.with_stages(soft=soft), tmp_path, only=["soft"])
    other = json.loads((tmp_path / "soft" / "numbers.json").read_text())
    np.testing.assert_allclose(other[0]["win_rate"], 0.5 + 0.6 * (np.array(found[0]["win_rate"]) - 0.5), atol=1e-12)
    assert other[0]["bootstrap"]["seed"] != found[0]["bootstrap"]["seed"]


def test_a_stage_that_cannot_rate_is_refused_before_anything_runs(tmp_path):
    with pytest.raises(UserError, match=r"RatePool\.bootstrap=-1 must be in"):
        aj.RatePool(table="table", bootstrap=-1)
    lonely = aj.Tournament(
        {"a": aj.Oracle("a")}, 4, aj.Writing(max_new_tokens=2, buckets=(8,), batch=2), {"x": "p"}, "p"
    )
    context = type("Context", (), {"name": "ratings", "experiment": type("E", (), {"stages": {"table": lonely}})})
    with pytest.raises(UserError, match="ratings: 'table' has one policy, and a pool needs two"):
        aj.RatePool(table="table").check(context)


def test_the_picture_has_the_masses_beside_elo_with_their_intervals():
    rated = rate_fully("judge: x", make_pool("abc", CYCLE, 50), 20, 0)
    left, right = rating_picture(rated).axes
    np.testing.assert_allclose([bar.get_width() for bar in left.patches], rated.ratings.lottery.mass)
    np.testing.assert_allclose([bar.get_width() for bar in right.patches], rated.ratings.fit.elo)
    assert [text.get_text() for text in left.get_yticklabels()] == list("abc")
    for axes, values, bounds in (
        (left, rated.ratings.lottery.mass, rated.intervals.mass), (right, rated.ratings.fit.elo, rated.intervals.elo),
    ):  # fmt: skip
        segments = np.array([segment[:, 0] for segment in axes.collections[0].get_segments()])
        np.testing.assert_allclose(segments[:, 0], np.minimum(bounds[:, 0], values), atol=1e-12)
        np.testing.assert_allclose(segments[:, 1], np.maximum(bounds[:, 1], values), atol=1e-12)


def test_the_text_names_ranges_virtual_wins_and_the_largest_residuals():
    text = rating_section(rate_fully("x", pool(LIMIT), 0, 0))
    assert "Several lotteries are Nash, with these masses: a 0.000 to 0.250; b 0.750 to 1.000." in text
    never = rating_section(rate_fully("x", pool([[0.5, 1.0], [0.0, 0.5]]), 0, 0))
    assert "half a virtual win" in never and "each cell counts as 100 comparisons" in never
    assert "The Condorcet winner is a" in never and "No three policies are without a tie" in never
    rate = zoo.unstructured(0, 1, 4)[0]
    fit = rate_pool(pool(rate)).fit
    i, j = max(itertools.combinations(range(4), 2), key=lambda pair: abs(fit.residual[pair]))
    most = f"most in {LETTERS[i]} over {LETTERS[j]} {rate[i, j]:.3f}, fitted {rate[i, j] - fit.residual[i, j]:.3f};"
    assert most in rating_section(rate_fully("x", pool(rate), 0, 0))
