"""Experiments as files: every leaf can be reached, every mistake is one line, every result has its name."""

import contextlib
import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from alignjax.errors import UserError
from alignjax.pipeline import config, run
from alignjax.tasks import sandbox
from alignjax.tasks.task import oracle_from_score

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    return config.load(QUICKSTART, {})


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr(run, "code_version", lambda: "now")


@pytest.fixture
def file(tmp_path):
    """Writes an experiment file; returns its path."""

    def write(text, folder="."):
        (tmp_path / folder).mkdir(exist_ok=True)
        path = tmp_path / folder / "experiment.py"
        path.write_text(text)
        return path

    return write


@contextlib.contextmanager
def refused(*words):
    """Expects a UserError of one line that holds the words."""
    with pytest.raises(UserError) as found:
        yield
    message = str(found.value)
    assert "\n" not in message and all(word in message for word in words), message


def another(value):
    """A text that parses to another value of the same type."""
    if isinstance(value, bool):
        return str(not value)
    if isinstance(value, float):
        return repr(value / 2 or 0.25)
    if isinstance(value, int | float):
        return repr(value - 1 if value > 1 else value + 1)
    if isinstance(value, tuple):
        return repr((*value, value[0]))
    choices = {
        "float32": "bfloat16", "none": "dots", "cosine": "constant", "rms": "layer", "silu": "gelu",
        "rotary": "learned", "unrolled": "scanned",
    }  # fmt: skip
    return "1" if value is None else choices.get(value, f"{value}-other")


def fingerprints(experiment):
    return {name: run.resolved(experiment, name)["fingerprint"] for name in experiment.stages}


def below(experiment, names):
    """The stages and all that are made from them."""
    found = set(names)
    for _ in experiment.stages:
        found |= {name for name, stage in experiment.stages.items() if found & set(stage.inputs())}
    return found


def test_every_leaf_of_the_quickstart_can_be_set_and_alone(quickstart):
    before = dict(config.leaves(quickstart))
    deep = {"stages.nash_md.objective.tau", "stages.pairs.writing.sampling.temperature", "stages.base.model.width"}
    assert deep | {"seed", "mesh.fsdp", "task.template.question", "stages.nash_md.buckets"} <= set(before)
    for path, value in before.items():
        if path.endswith((".lora", ".best")):  # a record or nothing: made in the file
            continue
        own = {"biases": "('q',)", "windows": "(4, 4)", "kind": "linear"}
        text = own.get(path.rsplit(".", 1)[-1]) or another(value)
        after = dict(config.leaves(config.override(quickstart, {path: text})))
        changed = {name for name in before if after[name] != before[name]}
        assert changed == {path} and list(after) == list(before)
        assert value is None or type(after[path]) is type(value)
    assert dict(config.leaves(quickstart)) == before


def test_the_word_stages_may_be_left_out(quickstart):
    for path in ("nash_md.objective.tau", "table.judges.oracle", "base.adam.lr"):
        short, full = (config.override(quickstart, {name: "7"}) for name in (path, f"stages.{path}"))
        assert config.describe(short) == config.describe(full) != config.describe(quickstart)


class Point(NamedTuple):
    x: int
    y: float


def test_nodes_keep_their_kind_and_neighbours():
    tree = {"p": Point(1, 2.0), "t": (3, (4, "five")), "f": partial(divmod, 8, 3), "g": partial(int, base=2), "n": None}
    settings = {"p.y": "3", "t.1.1": "six", "f.1": "5", "g.base": "16", "n": "'text'"}
    new = config.override(tree, settings)
    assert new["p"] == Point(1, 3.0) and isinstance(new["p"], Point) and isinstance(new["p"].y, float)
    assert new["t"] == (3, (4, "six")) and new["f"]() == (1, 3) and new["g"]("ff") == 255 and new["n"] == "text"
    assert tree["p"] == Point(1, 2.0) and tree["f"]() == (2, 2)


@pytest.mark.parametrize(("path", "nearest"), [
    ("nash_md.objectiv.tau", "nash_md.objective.tau"), ("nash.objective.tau", "nash_md.objective.tau"),
    ("tau", "nash_md.objective.tau"), ("sed", "seed"), ("nash_md.loop.step", "nash_md.loop.steps"),
])  # fmt: skip
def test_a_wrong_name_is_told_with_the_nearest_ones(quickstart, path, nearest):
    with refused(path, "did you mean", nearest):
        config.override(quickstart, {path: "1"})


@pytest.mark.parametrize("path", ["nash_md", "nash_md.objective", "nash_md.buckets.9", "zzz", "", "task.score"])
def test_what_is_no_leaf_cannot_be_set(quickstart, path):
    with refused("unknown field", repr(path)):
        config.override(quickstart, {path: "1"})


@pytest.mark.parametrize(("path", "text", "kind"), [
    ("nash_md.loop.steps", "many", "int"), ("nash_md.loop.steps", "1.5", "int"), ("nash_md.loop.steps", "True", "int"),
    ("nash_md.adam.lr", "fast", "float"), ("nash_md.adam.lr", "True", "float"), ("nash_md.adam.lr", "(1,)", "float"),
    ("nash_md.unfinished_loses", "1", "bool"), ("nash_md.unfinished_loses", "yes", "bool"),
    ("nash_md.loop.steps", "{[1]: 2}", "int"),
])  # fmt: skip
def test_a_value_of_another_type_is_refused(quickstart, path, text, kind):
    with refused(path, kind):
        config.override(quickstart, {path: text})


@pytest.mark.parametrize("text", ["1e3", "007", "2024_01", "1.50", "None", "a=b", "[1,2]", "two words"])
def test_a_text_leaf_takes_the_text_as_it_stands(text):
    assert config.override({"path": "runs"}, {"path": text}) == {"path": text}


def test_get_config_takes_its_parameters_from_the_settings(file):
    path = file("def get_config(size: int, name='a'):\n    return {'size': size, 'name': name, 'lr': 0.5}\n")
    assert config.load(path, {"size": "3", "name": "b", "lr": "1"}) == {"size": 3, "name": "b", "lr": 1.0}
    with refused(str(path), "size", "--set size="):
        config.load(path, {"name": "b"})
    with refused("nowhere.py"):
        config.load(path.with_name("nowhere.py"), {})


@pytest.mark.parametrize(("text", "word"), [
    ("def get_config(:\n", "SyntaxError"), ("import nothing_of_the_kind\n", "nothing_of_the_kind"),
    ("x = 1\n", "get_config"), ("def get_config():\n    raise ValueError('two\\nlines')\n", "two lines"),
    ("def get_config():\n    return dict(steps=1, **{'steps': 2})\n", "steps"), ("1 / 0\n", "ZeroDivisionError"),
])  # fmt: skip
def test_a_broken_file_is_one_line_that_names_it(file, text, word):
    path = file(text)
    with refused(str(path), word):
        config.load(path, {})


def test_an_edited_file_is_read_anew(file, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    for value in (0.1, 0.2):
        path = file(f"def get_config():\n    return {{'lr': {value}}}\n")
        os.utime(path, (1e9, 1e9))  # within the clock's tick, and of the same size
        assert config.load(path, {}) == {"lr": value}


def test_a_mistake_in_get_config_is_told_with_its_line(file):
    path = file("TABLE = {}\ndef get_config():\n    x = 1\n    return {'x': TABLE['y']}\n")
    with refused(f"{path}, line 4: KeyError: 'y'"):
        config.load(path, {})
    path = file("import sys\ndef get_config():\n    sys.exit(3)\n")
    with refused(f"{path}, line 3: SystemExit: 3"):
        config.load(path, {})


def test_tuples_are_set_whole():
    tree = {"buckets": (32, 104), "stop": ("a",), "rates": (0.5,), "none": ()}
    settings = {"buckets": "(8,16,24)", "stop": "</s>", "rates": "[1, 2]", "none": "(1,)"}
    want = {"buckets": (8, 16, 24), "stop": ("</s>",), "rates": (1.0, 2.0), "none": (1,)}
    assert config.override(tree, settings) == want and config.override(tree, {"buckets": "7"})["buckets"] == (7,)
    with refused("buckets='x' is not a int"):
        config.override(tree, {"buckets": "(8,'x')"})


@dataclasses.dataclass(frozen=True)
class Optional:
    decay: float | None = None
    truth: str | None = "stage"
    plain: str = "text"


def test_what_may_be_none_is_set_and_unset_and_its_kind_is_known():
    set_once = config.override(Optional(), {"decay": "1", "truth": "None", "plain": "None"})
    assert set_once == Optional(1.0, None, "None") and isinstance(set_once.decay, float)
    assert config.override(set_once, {"decay": "None", "truth": "7"}) == Optional(None, "7", "None")
    with refused("decay='high' is not a float or None"):
        config.override(Optional(), {"decay": "high"})


def test_a_parameter_is_among_the_nearest_names(file):
    path = file("def get_config(small: bool = False):\n    return {'lr': 0.5}\n")
    with refused("unknown field 'smal'", "did you mean small"):
        config.load(path, {"smal": "True"})


OWN = """
from functools import partial
RATE = {rate}
def scaled(x):
    return {scale} * x if x else scaled(x)
def unused():
    return {unused}
def make(k):
    def loss(x, tau):
        return scaled({body}) * RATE + k
    return loss
def get_config():
    return {{"objective": partial(make({k}), tau=0.1), "other": [1], "name": "n"}}
"""


def test_describe_notices_an_edited_function_and_what_it_closes_over_or_mentions(file):
    def described(folder, **changes):
        words = dict(body="x", k=1, rate=2, scale=3, unused=4)
        return config.describe(config.load(file(OWN.format(**{**words, **changes}), folder), {}))

    base = described("a")
    assert base == described("b") and base["name"] == "n" and base["objective"]["tau"] == 0.1
    for i, change in enumerate(({"body": "x * tau"}, {"k": 2}, {"rate": 5}, {"scale": 5})):
        assert base["objective"]["function"] != described(f"c{i}", **change)["objective"]["function"], change
    assert base == described("d", unused=5)


def test_describe_names_the_package_s_functions_and_is_json(quickstart):
    described = config.describe(quickstart)
    assert json.loads(json.dumps(described)) == described
    assert described["stages"]["nash_md"]["objective"]["function"] == "alignjax.objectives.nash_md"


def test_functions_are_described_by_what_they_do():
    class Constant:
        def __call__(self):
            return 0

    assert config.describe(Constant()) == config.describe(Constant())  # not by their addresses
    one, two = map(oracle_from_score, (sandbox.harmless, sandbox.helpful))  # nor by the package's names alone
    assert config.describe(one) == config.describe(oracle_from_score(sandbox.harmless)) != config.describe(two)


@pytest.mark.parametrize(("path", "stages"), [
    ("nash_md.objective.tau", {"nash_md"}), ("self_play.adam.lr", {"self_play"}), ("pairs.writing.batch", {"pairs"}),
    ("base.model.width", {"base"}), ("table.prompts", {"table"}), ("judge.loop.steps", {"judge"}),
    ("nash_md.loop.log_every", set()), ("base.loop.save_every", set()),
    ("seed", None), ("task.template.question", None), ("task.source.nouns", None),  # None: every stage
])  # fmt: skip
def test_a_leaf_moves_the_fingerprints_of_its_stage_and_of_all_below(quickstart, path, stages):
    known = dict(config.leaves(quickstart))
    value = known[path if path in known else f"stages.{path}"]
    before, after = fingerprints(quickstart), fingerprints(config.override(quickstart, {path: another(value)}))
    moved = {name for name in before if before[name] != after[name]}
    assert moved == (set(before) if stages is None else below(quickstart, stages))
    assert len(set(before.values())) == len(before)


def test_a_stage_is_prepared_finished_refused_and_redone(quickstart, tmp_path):
    folder, record = tmp_path / "nash_md", run.resolved(quickstart, "nash_md")
    other = run.resolved(config.override(quickstart, {"nash_md.objective.tau": "0.5"}), "nash_md")
    assert not run.prepare(folder, record, redo=False)
    assert not run.prepare(folder, other, redo=False)  # nothing was done yet: it is begun anew
    assert not run.prepare(folder, record, redo=False)
    (folder / "work").write_text("half")
    assert not run.prepare(folder, record, redo=False) and (folder / "work").exists()  # it resumes
    tau = record["config"]["objective"]["tau"]
    for finished in (False, True):
        run.write_record(folder, {**record, "finished": finished})
        with refused("nash_md", f"objective.tau={tau}, now 0.5", "--redo"):
            run.prepare(folder, other, redo=False)
        assert (folder / "work").exists()
    assert run.prepare(folder, record, redo=False)
    assert not run.prepare(folder, other, redo=True)
    assert not (folder / "work").exists() and run.read_record(folder)["fingerprint"] == other["fingerprint"]


@pytest.mark.parametrize("back", ["a failure", "the old configuration", "the old one after work", "a kill"])
def test_a_finished_stage_is_put_aside_until_its_new_one_is_finished(quickstart, tmp_path, back):
    folder, record = tmp_path / "nash_md", run.resolved(quickstart, "nash_md")
    other = run.resolved(config.override(quickstart, {"nash_md.objective.tau": "0.5"}), "nash_md")
    run.prepare(folder, record, redo=False)
    (folder / "params").write_text("trained")
    run.write_record(folder, {**record, "finished": True})
    assert not run.prepare(folder, other, redo=True) and not (folder / "params").exists()
    if back == "a failure":
        run.withdraw(folder)
    elif back == "the old configuration":
        assert run.prepare(folder, record, redo=False)
    elif back == "the old one after work":
        (folder / "work").write_text("half")
        with refused("now 0.02"):
            run.prepare(folder, record, redo=False)
        assert run.prepare(folder, record, redo=True)
    else:  # between putting aside and beginning
        (folder / run.RECORD).unlink()
        folder.rmdir()
        assert run.prepare(folder, record, redo=False)
    assert (folder / "params").read_text() == "trained" and run.read_record(folder)["finished"]
    assert not run.aside(folder).exists()


def test_a_failure_takes_nothing_that_was_done(quickstart, tmp_path):
    folder, record = tmp_path / "nash_md", run.resolved(quickstart, "nash_md")
    run.prepare(folder, record, redo=False)
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "checkpoints").mkdir()
    run.withdraw(folder)
    assert not folder.exists()
    run.prepare(folder, record, redo=False)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "4").write_text("saved")
    run.withdraw(folder)
    assert (folder / "checkpoints" / "4").exists()


def test_how_often_a_stage_looks_up_is_no_difference(quickstart, tmp_path):
    record = run.resolved(quickstart, "base")
    run.prepare(tmp_path / "base", record, redo=False)
    run.write_record(tmp_path / "base", {**record, "finished": True})
    often = config.override(quickstart, {"base.loop.log_every": "1", "base.loop.save_every": "7"})
    assert run.prepare(tmp_path / "base", run.resolved(often, "base"), redo=False)
    both = config.override(often, {"base.tokenizer_documents": "1"})
    assert run.difference(record, run.resolved(both, "base")).startswith("tokenizer_documents=")
    told = run.difference(run.resolved(quickstart, "pairs"), run.resolved(both, "pairs"))
    assert told.startswith("inputs.base=")


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / run.RECORD).write_text('{"finger')
    with refused(str(tmp_path / "base" / run.RECORD), "damaged"):
        run.read_record(tmp_path / "base")


@pytest.mark.parametrize(("text", "value"), [("false", False), ("FALSE", False), ("true", True), ("True", True)])
def test_a_parameter_of_get_config_has_its_defaults_type(file, text, value):
    path = file("def get_config(small: bool = False, size: int = 3):\n    return {'small': small, 'size': size}\n")
    assert config.load(path, {"small": text}) == {"small": value, "size": 3}
    assert config.override({"small": not value}, {"small": text}) == {"small": value}
    with refused("small='no' is not a bool"):
        config.load(path, {"small": "no"})
    with refused("size='x' is not a int"):
        config.load(path, {"size": "x"})
