"""Experiments as files: every leaf can be set, a mistake is one line, a fingerprint names what makes a result."""

import contextlib
import dataclasses
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest

import alignjax as aj
from alignjax.errors import UserError
from alignjax.pipeline import config, fingerprint, store
from alignjax.pipeline.description import describe
from alignjax.pipeline.fingerprint import difference, input_names, resolve
from alignjax.tasks.sandbox_grammar import harmless_score, helpful_score
from alignjax.tasks.task import oracle_from_score
from alignjax.types import Role

QUICKSTART = Path(__file__).parents[1] / "experiments" / "quickstart.py"


@pytest.fixture(scope="module")
def quickstart():
    return config.load(QUICKSTART, {})


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr(fingerprint, "code_version", lambda: "now")


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
    if isinstance(value, Role):
        return "AVERAGE" if value is Role.POLICY else "POLICY"
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
    return {name: fingerprint.fingerprint(experiment, name) for name in experiment.stages}


def prepare(folder, record, redo):
    """Calls ``store.prepare`` for a record of a quickstart's stage."""
    return store.prepare(folder, record, config.load(QUICKSTART, {}).stages[record["stage"]], redo)


def below(experiment, names):
    """The stages and all that are made from them."""
    found = set(names)
    for _ in experiment.stages:
        found |= {name for name, stage in experiment.stages.items() if found & set(input_names(stage))}
    return found


def test_every_leaf_of_the_quickstart_can_be_set_and_alone(quickstart):
    before = dict(config.leaves(quickstart))
    deep = {"stages.nash_md.objective.loss.tau", "stages.pairs.writing.sampling.temperature", "stages.base.model.width"}
    assert deep | {"seed", "mesh.fsdp", "task.template.question", "stages.nash_md.buckets"} <= set(before)
    for path, value in before.items():
        if path.endswith(
            (".lora", ".best", ".critic", ".replies_of_source", ".shorten")
        ):  # made in the file, or nothing
            continue
        if path == "task.template.preamble":  # a preference model reads the prompt first: a task refuses one
            continue
        own = {
            "keep_at": "(1,)",
            "biases": "('q',)",
            "windows": "(4, 4)",
            "kind": "linear",
            "gaps": "(1.0, 2.0, 3.0, 4.0)",
        }
        text = own.get(path.rsplit(".", 1)[-1]) or another(value)
        after = dict(config.leaves(config.override(quickstart, {path: text})))
        changed = {name for name in before if after[name] != before[name]}
        assert changed == {path} and list(after) == list(before)
        assert value is None or type(after[path]) is type(value)
    assert dict(config.leaves(quickstart)) == before


def test_the_word_stages_may_be_left_out(quickstart):
    for path in ("nash_md.objective.loss.tau", "table.prompts", "base.adam.lr"):
        short, full = (config.override(quickstart, {name: "7"}) for name in (path, f"stages.{path}"))
        assert describe(short) == describe(full) != describe(quickstart)


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
    ("nash_md.objectiv.loss.tau", "nash_md.objective.loss.tau"),
    ("nash.objective.loss.tau", "nash_md.objective.loss.tau"), ("tau", "nash_md.objective.loss.tau"),
    ("sed", "seed"), ("nash_md.loop.step", "nash_md.loop.steps"),
])  # fmt: skip
def test_a_wrong_name_is_told_with_the_nearest_ones(quickstart, path, nearest):
    with refused(path, "did you mean", nearest):
        config.override(quickstart, {path: "1"})


@pytest.mark.parametrize(
    "path", ["nash_md", "nash_md.objective", "nash_md.data.samplers", "nash_md.buckets.9", "zzz", "", "task.score"]
)
def test_what_is_no_leaf_cannot_be_set(quickstart, path):
    with refused("unknown field", repr(path)):
        config.override(quickstart, {path: "1"})


WHOLE = "a whole number"


@pytest.mark.parametrize(("path", "text", "kind"), [
    ("nash_md.loop.steps", "many", WHOLE), ("nash_md.loop.steps", "1.5", WHOLE), ("nash_md.loop.steps", "True", WHOLE),
    ("nash_md.adam.lr", "fast", "a number"), ("nash_md.adam.lr", "True", "a number"),
    ("nash_md.adam.lr", "(1,)", "a number"), ("nash_md.loop.steps", "{[1]: 2}", WHOLE),
    ("nash_md.data.unfinished_loses", "1", "True or False"), ("nash_md.data.unfinished_loses", "yes", "True or False"),
    ("nash_md.data.samplers.0.role", "0", "POLICY, REFERENCE, AVERAGE"),
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
    with refused("buckets='x' is not a whole number"):
        config.override(tree, {"buckets": "(8,'x')"})


@dataclasses.dataclass(frozen=True)
class Optional:
    decay: float | None = None
    truth: str | None = "stage"
    plain: str = "text"
    at: int | str = 1


def test_a_number_or_a_word_is_set_as_what_it_is():
    assert config.override(Optional(), {"at": "average"}).at == "average"
    assert config.override(Optional(at="average"), {"at": "3"}).at == 3


def test_what_may_be_none_is_set_and_unset_and_its_kind_is_known():
    set_once = config.override(Optional(), {"decay": "1", "truth": "None", "plain": "None"})
    assert set_once == Optional(1.0, None, "None") and isinstance(set_once.decay, float)
    assert config.override(set_once, {"decay": "None", "truth": "7"}) == Optional(None, "7", "None")
    with refused("decay='high' is not a number or None"):
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
        return describe(config.load(file(OWN.format(**{**words, **changes}), folder), {}))

    base = described("a")
    assert base == described("b") and base["name"] == "n" and base["objective"]["tau"] == 0.1
    for i, change in enumerate(({"body": "x * tau"}, {"k": 2}, {"rate": 5}, {"scale": 5})):
        assert base["objective"]["function"] != described(f"c{i}", **change)["objective"]["function"], change
    assert base == described("d", unused=5)


def test_describe_names_the_package_s_functions_and_is_json(quickstart):
    described = describe(quickstart)
    assert json.loads(json.dumps(described)) == described
    assert described["stages"]["nash_md"]["objective"]["loss"]["function"] == "alignjax.losses.policy_gradient.nash_md"
    assert described["stages"]["nash_md"]["data"]["samplers"]["1"] == {"role": "POLICY", "beta": 0.25}


def test_functions_are_described_by_what_they_do():
    class Constant:
        def __call__(self):
            return 0

    assert describe(Constant()) == describe(Constant())  # not by their addresses
    one, two = map(oracle_from_score, (harmless_score, helpful_score))  # nor by the package's names alone
    assert describe(one) == describe(oracle_from_score(harmless_score)) != describe(two)


USER_CODE = """
import dataclasses
import numpy as np
from functools import partial
TABLE = {{"a": {entry}}}
@dataclasses.dataclass(frozen=True)
class Part:
    x: int = 1
    def value(self):
        return self.x * {body}
PART = Part({part})
class Rule:
    def __init__(self, state):
        self.state = state
    def __call__(self):
        return self.state
def f(x, tau={default}, *, k={keyword}):
    return x * tau * k * TABLE["a"] * PART.value()
def get_config():
    return {{
        "default": f, "object": Rule({state}), "method": Part({held}).value, "part": Part(),
        "array": partial(f, np.arange(5000) * {array}), "set": partial(f, frozenset({{"b", "a", {member}}})),
        "keyword": partial(f, function={named}),
        "bound": lambda tau={bound}: f(1, tau),
    }}
"""
F_USERS = {"default", "array", "set", "keyword", "bound"}  # what calls f
USER_VALUES = dict(entry=1, body=1, part=1, default=1, keyword=1, state=1, held=1, array=1, member=1, named=1, bound=1)


@pytest.mark.parametrize(("change", "moved"), [
    ("entry", F_USERS), ("part", F_USERS),
    ("body", F_USERS | {"method", "part"}), ("state", {"object"}),
    ("default", F_USERS), ("keyword", F_USERS),
    ("held", {"method"}), ("array", {"array"}), ("member", {"set"}), ("named", {"keyword"}), ("bound", {"bound"}),
])  # fmt: skip
def test_everything_that_user_code_depends_on_moves_its_description(file, change, moved):
    """Defaults, dicts, objects, methods, arrays, sets, classes; and nothing else moves."""
    before = config.load(file(USER_CODE.format(**USER_VALUES), "a"), {})
    after = config.load(file(USER_CODE.format(**{**USER_VALUES, change: 7}), "b"), {})
    assert {name for name in before if describe(before[name]) != describe(after[name])} == moved
    assert json.loads(json.dumps(describe(before))) == describe(before)


def test_a_value_that_names_a_place_in_memory_is_refused():
    with pytest.raises(UserError, match="cannot stand in an experiment"):
        describe({"x": object()})


@pytest.mark.parametrize(("path", "stages"), [
    ("nash_md.objective.loss.tau", {"nash_md"}), ("nash_md.data.samplers.1.beta", {"nash_md"}),
    ("self_play.adam.lr", {"self_play"}), ("pairs.writing.batch", {"pairs"}),
    ("base.model.width", {"base"}), ("table.prompts", {"table"}), ("judge.loop.steps", {"judge"}),
    ("nash_md.loop.log_every", set()), ("base.loop.save_every", set()), ("base.loop.keep", set()),
    ("pairs.writing.gather", set()), ("nash_md.data.gather", set()), ("base.model.remat", set()),
    ("base.model.decode", set()),
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
    folder, record = tmp_path / "nash_md", resolve(quickstart, "nash_md")
    other = resolve(config.override(quickstart, {"nash_md.objective.loss.tau": "0.5"}), "nash_md")
    assert not prepare(folder, record, redo=False)
    assert not prepare(folder, other, redo=False)  # nothing was done yet: it is begun anew
    assert not prepare(folder, record, redo=False)
    (folder / "work").write_text("half")
    assert not prepare(folder, record, redo=False) and (folder / "work").exists()  # it resumes
    tau = record["config"]["objective"]["loss"]["tau"]
    for finished in (False, True):
        store.write_record(folder, {**record, "finished": finished})
        with refused("nash_md", f"objective.loss.tau={tau}, now 0.5", "--redo"):
            prepare(folder, other, redo=False)
        assert (folder / "work").exists()
    assert prepare(folder, record, redo=False)
    assert not prepare(folder, other, redo=True)
    assert not (folder / "work").exists() and store.read_record(folder)["fingerprint"] == other["fingerprint"]


@pytest.mark.parametrize("back", ["a failure", "the old configuration", "the old one after work", "a kill"])
def test_a_finished_stage_is_put_aside_until_its_new_one_is_finished(quickstart, tmp_path, back):
    folder, record = tmp_path / "nash_md", resolve(quickstart, "nash_md")
    other = resolve(config.override(quickstart, {"nash_md.objective.loss.tau": "0.5"}), "nash_md")
    prepare(folder, record, redo=False)
    (folder / "params").write_text("trained")
    store.write_record(folder, {**record, "finished": True})
    assert not prepare(folder, other, redo=True) and not (folder / "params").exists()
    if back == "a failure":
        store.clean_up_failed(folder)
    elif back == "the old configuration":
        assert prepare(folder, record, redo=False)
    elif back == "the old one after work":
        (folder / "work").write_text("half")
        with refused("now 0.02"):
            prepare(folder, record, redo=False)
        assert prepare(folder, record, redo=True)
    else:  # between putting aside and beginning
        (folder / store.RECORD).unlink()
        folder.rmdir()
        assert prepare(folder, record, redo=False)
    assert (folder / "params").read_text() == "trained" and store.read_record(folder)["finished"]
    assert not store.set_aside(folder).exists()


def test_a_failure_takes_nothing_that_was_done(quickstart, tmp_path):
    folder, record = tmp_path / "nash_md", resolve(quickstart, "nash_md")
    prepare(folder, record, redo=False)
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "checkpoints").mkdir()
    store.clean_up_failed(folder)
    assert not folder.exists()
    prepare(folder, record, redo=False)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "4").write_text("saved")
    store.clean_up_failed(folder)
    assert (folder / "checkpoints" / "4").exists()


def test_how_often_a_stage_looks_up_is_no_difference(quickstart, tmp_path):
    record = resolve(quickstart, "base")
    prepare(tmp_path / "base", record, redo=False)
    store.write_record(tmp_path / "base", {**record, "finished": True})
    often = config.override(quickstart, {"base.loop.log_every": "1", "base.loop.save_every": "7"})
    assert prepare(tmp_path / "base", resolve(often, "base"), redo=False)
    both = config.override(often, {"base.tokenizer_documents": "1"})
    assert difference(record, resolve(both, "base"), both.stages["base"]).startswith("tokenizer_documents=")
    words = difference(resolve(quickstart, "pairs"), resolve(both, "pairs"), both.stages["pairs"])
    assert words.startswith("inputs.base=")


def test_a_damaged_record_is_refused(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / store.RECORD).write_text('{"finger')
    with refused(str(tmp_path / "base" / store.RECORD), "damaged"):
        store.read_record(tmp_path / "base")


@pytest.mark.parametrize(("text", "value"), [("false", False), ("FALSE", False), ("true", True), ("True", True)])
def test_a_parameter_of_get_config_has_its_defaults_type(file, text, value):
    path = file("def get_config(small: bool = False, size: int = 3):\n    return {'small': small, 'size': size}\n")
    assert config.load(path, {"small": text}) == {"small": value, "size": 3}
    assert config.override({"small": not value}, {"small": text}) == {"small": value}
    with refused("small='no' is not True or False"):
        config.load(path, {"small": "no"})
    with refused("size='x' is not a whole number"):
        config.load(path, {"size": "x"})


def own_loss(first, second, p, *, keep, decode):
    return keep * (first - second)


@dataclasses.dataclass(frozen=True)
class OwnMethod:
    """A labelling method whose fields have the names of fields without effect elsewhere."""

    keep: int = 1
    decode: str = "a"
    log_every: float = 0.5
    judge: ClassVar[None] = None


def moved(before, after):
    """Returns the stages whose fingerprints differ; a stage is compared with the one of its name."""
    old, new = fingerprints(before), fingerprints(after)
    return {name for name in old.keys() & new.keys() if old[name] != new[name]}


@pytest.mark.parametrize("change", [{"keep": 2}, {"decode": "b"}, {"log_every": 0.25}])
def test_a_method_s_own_field_of_any_name_changes_its_fingerprint(quickstart, change):
    pairs = quickstart.stages["pairs"]
    first, second = (
        quickstart.with_stages(pairs=dataclasses.replace(pairs, method=method))
        for method in (OwnMethod(), OwnMethod(**change))
    )
    assert moved(first, second) == below(quickstart, {"pairs"})
    name = next(iter(change))
    words = difference(resolve(first, "pairs"), resolve(second, "pairs"), second.stages["pairs"])
    assert words.startswith(f"method.{name}=")


@pytest.mark.parametrize("change", [{"keep": 2}, {"decode": 3}])
def test_an_objective_s_own_keyword_of_any_name_changes_its_fingerprint(quickstart, change):
    def with_loss(**keywords):
        loss = partial(own_loss, **{"keep": 1, "decode": 2, **keywords})
        arm = dataclasses.replace(quickstart.stages["nash_md"], objective=aj.DirectAlignment(loss))
        return quickstart.with_stages(nash_md=arm)

    first, second = with_loss(), with_loss(**change)
    assert moved(first, second) == {"nash_md", "table"}
    words = difference(resolve(first, "nash_md"), resolve(second, "nash_md"), second.stages["nash_md"])
    assert words.startswith(f"objective.loss.{next(iter(change))}=")


@pytest.mark.parametrize("name", ["keep", "decode", "seed", "stages"])
def test_a_stage_may_have_any_name_and_its_users_depend_on_what_it_is(quickstart, name):
    """An input's name is not part of the fingerprint, and its configuration is."""
    stages = {name if old == "pairs" else old: stage for old, stage in quickstart.stages.items()}
    stages["preference"] = dataclasses.replace(stages["preference"], pairs=name)
    renamed = dataclasses.replace(quickstart, stages=stages)
    assert fingerprints(renamed)[name] == fingerprints(quickstart)["pairs"]
    assert moved(quickstart, renamed) == set()
    edited = config.override(renamed, {f"stages.{name}.prompts": "7"})
    assert moved(renamed, edited) == {name, *below(renamed, {name})}


def test_a_table_depends_on_its_policies_and_on_their_names_in_the_table(quickstart):
    """A policy's name in the table seeds its draws; the stage's name does not."""
    table = quickstart.stages["table"]
    stages = {("other" if name == "nash_md" else name): stage for name, stage in quickstart.stages.items()}
    stages["table"] = dataclasses.replace(table, policies={**table.policies, "nash_md": "other"})
    assert moved(quickstart, dataclasses.replace(quickstart, stages=stages)) == set()
    policies = {"base": "base", "other": "nash_md", "self_play": "self_play"}
    assert moved(quickstart, quickstart.with_stages(table=dataclasses.replace(table, policies=policies))) == {"table"}


def test_equal_stages_have_one_fingerprint_and_stages_of_two_types_never(quickstart):
    base = quickstart.stages["base"]
    twins = quickstart.with_stages(twin=base, asked=aj.ZeroShotPreference("base"))
    assert fingerprints(twins)["twin"] == fingerprints(twins)["base"]

    @dataclasses.dataclass(frozen=True)
    class ZeroShotPreference2(aj.ZeroShotPreference):
        pass

    other = twins.with_stages(asked=ZeroShotPreference2("base"))
    assert moved(twins, other) == {"asked"}


NO_EFFECT = {
    "base.loop.log_every": 3, "base.loop.save_every": 3, "base.loop.keep": 5, "base.model.remat": "full",
    "base.model.decode": "scanned", "pairs.writing.gather": False, "nash_md.data.gather": False,
    "table.writing.gather": False, "nash_md.loop.keep": 7, "preference.loop.log_every": 1,
}  # fmt: skip


@pytest.mark.parametrize("path", NO_EFFECT)
def test_a_field_without_effect_changes_no_fingerprint_and_no_difference_names_it(quickstart, path):
    name, _, leaf = path.partition(".")
    quiet = config.override(quickstart, {path: str(NO_EFFECT[path])})
    assert moved(quickstart, quiet) == set()
    loud = config.override(quiet, {f"{name}.seed": "5"})
    words = difference(resolve(quickstart, name), resolve(loud, name), loud.stages[name])
    assert words == "seed=0, now 5" and dict(config.leaves(quiet))[f"stages.{path}"] == NO_EFFECT[path]
    assert leaf not in words


def test_a_field_without_effect_inside_a_tuple_is_never_named(quickstart):
    @dataclasses.dataclass(frozen=True)
    class Several:
        loops: tuple[aj.Loop, ...]
        seed: int = 0

    def record(keep, seed):
        experiment = aj.Experiment(None, {"several": Several((aj.Loop(1, 1, keep=keep),), seed)})
        return resolve(experiment, "several"), experiment.stages["several"]

    (old, _), (same, _), (new, stage) = record(2, 0), record(3, 0), record(3, 1)
    assert old["fingerprint"] == same["fingerprint"] != new["fingerprint"]
    assert difference(old, new, stage) == "seed=0, now 1"


def test_a_renamed_input_is_never_named_as_the_difference(quickstart):
    """Another input is, by its field where its name changed and by its fingerprint where its content did."""
    twin = quickstart.with_stages(copy=quickstart.stages["pairs"])
    fit = twin.stages["preference"]
    renamed = twin.with_stages(preference=dataclasses.replace(fit, pairs="copy"))
    assert moved(twin, renamed) == set()
    seeded = renamed.with_stages(preference=dataclasses.replace(fit, pairs="copy", seed=1))
    old, new = resolve(twin, "preference"), resolve(seeded, "preference")
    assert difference(old, new, seeded.stages["preference"]) == "seed=0, now 1"
    other = twin.with_stages(preference=dataclasses.replace(fit, pairs="annotated"))
    words = difference(old, resolve(other, "preference"), other.stages["preference"])
    assert words == "pairs='pairs', now 'annotated'"
    edited = config.override(twin, {"pairs.prompts": "9"})
    words = difference(old, resolve(edited, "preference"), edited.stages["preference"])
    assert words.startswith("inputs.pairs=")
    policies = {**twin.stages["table"].policies, "nash_md": "self_play"}
    table = twin.with_stages(table=dataclasses.replace(twin.stages["table"], policies=policies))
    words = difference(resolve(twin, "table"), resolve(table, "table"), table.stages["table"])
    assert words == "policies.nash_md='nash_md', now 'self_play'"
