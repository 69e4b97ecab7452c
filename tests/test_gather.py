"""A table of the policies that are finished: which are compared, what is written anew, and what is refused."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.pipeline.run import run, show_report
from alignjax.pipeline.stages import Tournament
from alignjax.pipeline.stages.replies import has_replies, write_replies
from tests.test_wiring import WRITING, Random, experiment, policy_stage, tokenizer

POLICIES = {"base": "base", "second": "other", "third": "third", "fourth": "fourth"}
TABLE = aj.Tournament(
    policies=POLICIES, reference="base", judges={"longer": aj.Oracle("longer")}, prompts=10, writing=WRITING,
    gather=True,
)  # fmt: skip


def arms(**stages):
    tokenizer()  # a part of the fingerprint of Random
    return experiment(**{"third": Random(2), "fourth": Random(3), "table": TABLE, **stages})


@pytest.fixture
def written(monkeypatch):
    """The names of the policies that wrote, in order. They write as they do."""
    names, draw = [], Tournament.draw

    def counted(self, context, programs, name, *rest):
        names.append(name)
        return draw(self, context, programs, name, *rest)

    monkeypatch.setattr(Tournament, "draw", counted)
    return names


@pytest.fixture
def drawn(monkeypatch):
    """As ``written``, but what each writes is a number of its network's: nothing is compiled, no picture is drawn."""
    monkeypatch.setattr("alignjax.pipeline.run.show_report", lambda *_: None)
    return stub_draw(monkeypatch)


def stub_draw(monkeypatch):
    names = []

    def draw(self, context, programs, name, policy, reference, prompts):
        names.append(name)
        number = str(float(jax.tree.leaves(policy.params)[0].ravel()[0]))
        return zip(*[(f"{number} {prompt}", 1, 0.0, -1.0) for prompt in prompts], strict=True)

    monkeypatch.setattr(Tournament, "draw", draw)
    return names


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A folder in which all is finished, written as by ``drawn``."""
    folder = tmp_path_factory.mktemp("gather") / "w"
    with pytest.MonkeyPatch.context() as patch:
        stub_draw(patch)
        run(arms(), folder)
    return folder


@pytest.fixture
def whole(once, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(once, tmp_path / "w")


def table_of(folder):
    return storage.read_json(folder / "table" / "win_rates.json")[0]


def texts(folder, name):
    return (folder / "table" / f"replies-{name}.json").read_text()


def test_a_table_grows_with_the_policies_that_are_finished(tmp_path, written, capfd):
    """It ends as the table of all would be, and each policy writes once: n policies, n generations."""
    run(arms(), tmp_path / "w", only=["base", "other"])
    run(arms(), tmp_path / "w", only=["table"])
    found, (out, err) = table_of(tmp_path / "w"), capfd.readouterr()
    record = storage.read_json(tmp_path / "w" / "table" / "stage.json")
    assert found["policies"] == ["base", "second"] == list(record["config"]["policies"])
    assert record["finished"] and record["missing"] == ["third", "fourth"] and record["figures"]["replies"] == 20
    assert "table: without third, fourth, not finished\n" in err
    assert "NOT in this table, because they were not finished when it was made: third, fourth." in out
    first = texts(tmp_path / "w", "second")

    run(arms(), tmp_path / "w", only=["third"])
    with pytest.raises(UserError, match=r"'fourth' in .* is not finished"):
        show_report(arms(), tmp_path / "w")
    show_report(arms(), tmp_path / "w", keep_going=True)  # the smaller table still stands
    run(arms(), tmp_path / "w", only=["table"])
    assert table_of(tmp_path / "w")["policies"] == ["base", "second", "third"]
    run(arms(), tmp_path / "w")
    assert written == list(POLICIES) and texts(tmp_path / "w", "second") == first
    whole = storage.read_json(tmp_path / "w" / "table" / "stage.json")
    assert "missing" not in whole and whole["figures"]["replies"] == 40
    assert "NOT in this table" not in (tmp_path / "w" / "report.md").read_text()
    assert not (tmp_path / "w" / ".table.before").exists()

    plain = arms(table=dataclasses.replace(TABLE, gather=False))
    run(plain, tmp_path / "w")
    assert written == list(POLICIES)  # it was finished before
    run(plain, tmp_path / "v")
    assert written == [*POLICIES, *POLICIES]
    assert table_of(tmp_path / "v") == table_of(tmp_path / "w")
    assert all(texts(tmp_path / "v", name) == texts(tmp_path / "w", name) for name in POLICIES)


def test_a_policy_that_was_made_again_writes_anew_and_the_others_do_not(whole, drawn):
    before = {name: texts(whole, name) for name in POLICIES}
    changed = arms(other=Random(7))
    run(changed, whole, only=["other"], redo=True)
    with pytest.raises(UserError, match=r"table.*was made with inputs\.other=.*--redo"):
        run(changed, whole, only=["table"])
    run(changed, whole, only=["table"], redo=True)
    assert drawn == ["second"]
    assert {name for name in POLICIES if texts(whole, name) != before[name]} == {"second"}


@pytest.mark.parametrize("change", [{"prompts": 9}, {"seed": 1}, {"reference": "other"}, {"split": "validation"}])
def test_replies_under_another_configuration_are_not_reused(whole, drawn, change):
    other = arms(table=dataclasses.replace(TABLE, **change))
    with pytest.raises(UserError, match="was made with"):
        run(other, whole)
    run(other, whole, redo=True)
    assert drawn == list(POLICIES)


def test_another_judge_needs_no_new_replies(whole, drawn):
    judges = {**TABLE.judges, "again": aj.Oracle("longer")}
    run(arms(table=dataclasses.replace(TABLE, judges=judges)), whole, redo=True)
    assert drawn == [] and len(storage.read_json(whole / "table" / "win_rates.json")) == 2


def test_too_few_policies_or_no_reference_are_refused_in_one_line(tmp_path):
    run(arms(), tmp_path, only=["base"])
    words = r"^table: fewer than two of its policies are finished \(base\); run other or third or fourth first$"
    with pytest.raises(UserError, match=words):
        run(arms(), tmp_path, only=["table"])
    run(arms(), tmp_path, only=["other"])
    with pytest.raises(UserError, match="stage 'table' needs 'third', which is not finished"):
        run(arms(table=dataclasses.replace(TABLE, reference="third")), tmp_path, only=["table"])
    with pytest.raises(UserError, match="stage 'table' needs 'third', which is not finished"):
        run(arms(table=dataclasses.replace(TABLE, gather=False)), tmp_path, only=["table"])
    assert not (tmp_path / "table").exists()


def test_a_table_that_cannot_grow_is_as_it_was(tmp_path, drawn, monkeypatch):
    run(arms(), tmp_path, only=["base", "other"])
    run(arms(), tmp_path, only=["table"])
    before = {path.name: path.read_text() for path in (tmp_path / "table").iterdir() if path.is_file()}
    run(arms(), tmp_path, only=["third"])

    def refuse(*_):
        raise UserError("table: the judge is gone")

    with monkeypatch.context() as patch:
        patch.setattr(aj.Oracle, "open", refuse)
        with pytest.raises(UserError, match="the judge is gone"):
            run(arms(), tmp_path, only=["table"])
    after = {path.name: path.read_text() for path in (tmp_path / "table").iterdir() if path.is_file()}
    assert {name: after[name] for name in before} == before and after.keys() - before.keys() == {"replies-third.json"}
    assert not (tmp_path / ".table.before").exists()
    run(arms(), tmp_path, only=["table"])
    assert drawn == ["base", "second", "third"]  # what the third had written is kept too


def test_a_killed_table_that_then_grows_keeps_its_replies(tmp_path, drawn, monkeypatch):
    run(arms(), tmp_path, only=["base", "other"])

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(aj.Oracle, "open", kill)
        with pytest.raises(KeyboardInterrupt):
            run(arms(), tmp_path, only=["table"])
    run(arms(), tmp_path, only=["third"])
    run(arms(), tmp_path, only=["table"])
    assert drawn == ["base", "second", "third"] and table_of(tmp_path)["policies"] == ["base", "second", "third"]


def test_a_failed_arm_is_left_out_of_a_table_that_gathers(tmp_path, drawn, capfd):
    @dataclasses.dataclass(frozen=True)
    class Broken(Random):
        def run(self, context, programs):
            raise UserError(f"{context.name}: it is broken; mend it")

    with pytest.raises(UserError, match=r"^failed: third; skipped: none;"):
        run(arms(third=Broken(2)), tmp_path, keep_going=True)
    assert table_of(tmp_path)["policies"] == ["base", "second", "fourth"]
    assert "NOT in this table" in capfd.readouterr().out
    with pytest.raises(UserError, match=r"^failed: third; skipped: table;"):
        run(arms(third=Broken(2), table=dataclasses.replace(TABLE, gather=False)), tmp_path, keep_going=True)


def test_replies_are_known_by_what_they_depend_on(tmp_path):
    path = tmp_path / "replies-a.json"
    assert not has_replies(path, "x")
    write_replies(path, "x", (["t"], [1], [0.0], [-1.0]))
    assert has_replies(path, "x") and not has_replies(path, "y")
    storage.write_json(path, {"text": ["t"], "length": [1], "kl": [0.0], "reference_logp": [-1.0]})
    assert not has_replies(path, "x")  # of a version that did not say
    path.write_text("{")
    with pytest.raises(UserError, match="missing or damaged"):
        has_replies(path, "x")


@dataclasses.dataclass(frozen=True)
class Known(Random):
    """A network that the held-out law knows."""

    def exposure(self, context):
        return aj.Exposure(identity=frozenset({"known"}))


def test_the_judge_that_a_policy_was_trained_against_says_so_everywhere(tmp_path, monkeypatch, capfd):
    stub_draw(monkeypatch)
    asked, oracle = aj.ModelJudge("asked"), aj.Oracle("longer")
    table = dataclasses.replace(
        TABLE, policies={"base": "base", "md": "md"}, judges={"p": aj.TrainingJudge(asked), "longer": oracle}
    )
    run(arms(base=Known(0), asked=aj.ZeroShotPreference("base"), md=policy_stage(), table=table), tmp_path)
    found, oracles = storage.read_json(tmp_path / "table" / "win_rates.json")
    assert found["judge"] == "p-NOT-held-out" and oracles["judge"] == "longer"
    assert found["judge_description"].startswith("NOT held out: ") and "stage asked" in found["judge_description"]
    assert storage.read_json(tmp_path / "table" / "judgments-p-NOT-held-out.json")
    out, report = capfd.readouterr().out, (tmp_path / "report.md").read_text()
    for heading in ("Win rate of row over column", "The row against base"):
        assert f"## {heading}, judge: p-NOT-held-out\n" in out and f"## {heading}, judge: p-NOT-held-out\n" in report
    assert np.asarray(found["mean_probability"]).shape == (2, 2)
