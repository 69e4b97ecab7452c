"""The command line: every mistake is answered by one line and exit status 2, and nothing is half-written."""

import dataclasses
import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from jax.errors import JaxRuntimeError

from alignjax import cli
from alignjax.checkpoints import huggingface
from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.models.decoder import decoder
from tests.conftest import TINY
from tests.test_checkpoint_errors import edit

PROGRESS = r"\w+: +\d+%\||\w+: finished before|\w+: [\d.]+ s;"  # progress bars, and the line of a finished stage
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
QUICKSTART = str(EXPERIMENTS / "quickstart.py")
SHORT = ["small=True", "base.documents=200", "base.loop.steps=4", "base.loop.save_every=1"]


def settings(*values):
    """Returns the arguments that set these PATH=VALUE texts."""
    return [part for value in values for part in ("--set", value)]


def refused(capfd, *argv):
    """Runs the command in this process; returns its one-line error."""
    assert main(argv) == 2
    lines = [line for line in re.split("[\r\n]", capfd.readouterr().err) if line and not re.match(PROGRESS, line)]
    assert len(lines) == 1 and lines[0].startswith("alignjax:"), lines
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--set", "nash_md.objective.loss.tua=0.1"], "did you mean nash_md.objective.loss.tau"),
        (["--set", "lr=0.1"], "adam.lr"),
        (["--set", "nash_md.objective.loss.tau=big"], "is not a number"),
        (["--set", "nonsense"], "is not PATH=VALUE"),
        (["--set", "nash_md.data.samplers.1.role=judge"], "choose one of POLICY, REFERENCE, AVERAGE"),
        (["--only", "nash"], "unknown stage 'nash'; this experiment has base, pairs"),
        (["--set", "mesh.data=3"], "does not divide 8 devices"),
        (["--set", "mesh.tensor=0"], "positive sizes"),
        (["--set", "nash_md.data.preference=judgement"], "which is no stage"),
        (["--only", "nash_md"], "needs 'preference', which is not finished"),
    ],
)
def test_a_wrong_word_is_answered_with_what_to_do(capfd, tmp_path, argv, message):
    assert message in refused(capfd, "run", QUICKSTART, "--workdir", str(tmp_path / "w"), *argv)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("base.loop.batch=6", "does not divide over data*fsdp=8"),
        ("base.loop.accumulate=3", "does not divide batch"),
        ("base.adam.schedule=step", "choose cosine, linear or constant"),
        ("base.adam.moments=float16", "choose float32 or bfloat16"),
        ("base.model.vocab_size=100", "is below"),
        ("base.model.kv_heads=3", "is not a multiple of kv_heads"),
        ("base.model.remat=some", "choose one of none, dots, full"),
        ("base.loop.batch=100000", "do not fill one batch"),
        ("base.loop.batch=0", "base.loop.batch=0: Loop.batch=0 must be in [1, inf)"),
        ("base.loop.log_every=0", "Loop.log_every=0 must be"),
        ("base.adam.lr=-1.0", "Adam.lr=-1.0 must be in [0, inf)"),
        ("base.adam.b1=2.0", "Adam.b1=2.0 must be in [0, 1]"),
        ("base.model.width=0", "TransformerConfig.width=0 must be"),
        ("task.source.two_turns=3.0", "World.two_turns=3.0 must be in [0, 1]"),
        ("task.template.answer=two words here", "task.template.answer: 'two words here' is"),
        ("task.template.other=two words here", "task.template.other: 'two words here' is"),
        ("pairs.prompts=-3", "Label.prompts=-3 must be"),
        ("pairs.writing.buckets=-3,104", "Writing.buckets=(-3, 104) must be"),
        ("pairs.writing.sampling.top_p=0.0", "Sampling.top_p=0.0 must be"),
        ("pairs.writing.max_new_tokens=0", "Writing.max_new_tokens=0 must be"),
        ("table.prompts=0", "Tournament.prompts=0 must be"),
    ],
)
def test_a_value_that_cannot_work_is_named(capfd, tmp_path, change, message):
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path), "--only", "base", *settings(*SHORT[:3], change)]
    assert message in refused(capfd, *argv)
    assert not (tmp_path / "base" / "params").exists()


def test_missing_files_and_workdirs(capfd, tmp_path, monkeypatch):
    small = ["run", QUICKSTART, *settings("small=True")]
    assert "is not a file" in refused(capfd, "run", str(tmp_path / "none.py"), "--workdir", str(tmp_path))
    assert "--workdir is missing" in refused(capfd, *small)
    assert "--workdir is missing" in refused(capfd, *small, "--workdir", "")
    assert "s3://b/w is neither a path nor gs://BUCKET/FOLDER" in refused(capfd, *small, "--workdir", "s3://b/w")
    assert "gs:// is neither" in refused(capfd, *small, "--workdir", "gs://")
    with monkeypatch.context() as patch:
        patch.setattr("importlib.util.find_spec", lambda name: None)
        assert "gs://b/w needs gcsfs; pip install 'alignjax[gs]'" in refused(capfd, *small, "--workdir", "gs://b/w")
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refused(capfd, *small, "--workdir", str(tmp_path / "taken"))
    assert "alignjax:" in refused(capfd, *small, "--workdir", "/proc/alignjax")
    assert "is not finished" in refused(capfd, "table", QUICKSTART, "--workdir", str(tmp_path / "new"))


STAGE = "import alignjax as aj\ndef get_config():\n    return aj.Experiment(task=None, stages={stages})\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no get_config()"),
        ("def get_config(:\n", "SyntaxError"),
        ("def get_config():\n    pass\n", "get_config() returned a NoneType; it must return an"),
        ("def get_config():\n    return {'seed': 1}\n", "returned a dict"),
        ("get_config = 5\n", "get_config has the type int and must be a function"),
        ("get_config = dict\n", "get_config has the type type and must be a function"),
        (STAGE.format(stages="[1]"), "line 3: Experiment.stages is a list; give it a dict"),
        (
            STAGE.format(stages="{}").replace("task=None", "task=3"),
            "line 3: Experiment.task is a int; give it a Task, whose source that may be",
        ),
        (STAGE.format(stages="{}, mesh=None"), "line 3: Experiment.mesh is a NoneType; give it a Mesh"),
        (STAGE.format(stages="{}, seed='x'"), "line 3: Experiment.seed is a str; give it a int"),
        (STAGE.format(stages="{}"), "the experiment has no stages"),
        (STAGE.format(stages="{3: aj.LoadCheckpoint('x')}"), "3 cannot name a stage"),
        (
            STAGE.format(stages="{'a': aj.LoadCheckpoint}"),
            "stage 'a' is the class LoadCheckpoint; make an instance: LoadCheckpoint(...)",
        ),
        (STAGE.format(stages="{'a': 3}"), "stage 'a' is a int, which is no dataclass"),
        (STAGE.format(stages="{'../a': 3}"), "'../a' cannot name a stage"),
        (STAGE.format(stages="{'compiled': 3}"), "'compiled' cannot name a stage"),
    ],
)
def test_a_file_that_defines_no_experiment_is_refused(capfd, tmp_path, text, message):
    (tmp_path / "mine.py").write_text(text)
    for command, *words in (["run"], ["run", "--help"], ["table"]):
        assert message in refused(capfd, command, str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "w"), *words)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("table.judges.oracle.name=truth", "table: task 'sandbox-harmless' has no oracle 'truth'; it has oracle"),
        ("table.judges.held-out.stage=preference", "name a held-out judge"),
        ("table.policies.base=pairs", "stage 'table' needs a policy as policies.base, and 'pairs' makes pairs"),
        ("table.split=tests", "no split 'tests'"),
        (
            "nash_md.data.preference=base",
            "stage 'nash_md' needs a preference model as data.preference, and 'base' makes a policy",
        ),
        ("nash_md.loop.batch=12", "nash_md.loop.batch=12 does not divide over data*fsdp=8"),
        ("nash_md.average_decay=high", "is not a number or None"),
        ("nash_md.loop.batch=128", "nash_md: 64 examples do not fill one batch of 128"),
        ("base.loop.batch=4008", "base: 4000 examples do not fill one batch of 4008"),
        ("nash_md.data.samplers.1.beta=2", "nash_md.data.samplers.1.beta=2: Sampler.beta=2.0 must be in [0, 1]"),
        ("nash_md.data.samplers.1.beta=-1", "Sampler.beta=-1.0 must be in [0, 1]"),
        ("nash_md.objective.loss.tau=-1", "nash_md.objective: tau=-1.0 must be finite and not negative"),
        ("truth.method.judge.name=none", "truth: task 'sandbox-harmless' has no oracle 'none'; it has oracle, "),
        ("annotated.method.error=1.5", "Judged.error=1.5 must be in [0, 1]"),
        ("task.template.answer=", "task 'sandbox-harmless' has no template.answer"),
        ("task.format.stop=()", "has format.stop=(); give"),
        ("task.format.stop=", "has format.stop=('',); give"),
        ("preference.pairs=base", "stage 'preference' needs pairs as pairs, and 'base' makes a policy"),
        ("preference.truth=pairs", "truth and pairs are both 'pairs', which holds nothing out"),
        ("base.model.compute_dtype=float99", "choose one of float32, bfloat16, float16"),
        ("base.adam.lr=1e999", "Adam.lr=inf must be in [0, inf)"),
        ("smal=True", "did you mean small"),
    ],
)
def test_an_error_that_can_be_foreseen_is_reported_before_anything_runs(capfd, tmp_path, change, message):
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), *settings("small=True", change)]
    assert message in refused(capfd, *argv)
    assert not (tmp_path / "w").exists()


def test_a_missing_wandb_is_reported_before_anything_runs(capfd, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), *settings("small=True", "wandb=mine")]
    assert "pip install 'alignjax[wandb]'" in refused(capfd, *argv)
    assert not (tmp_path / "w").exists()


OWN = """
import dataclasses
from typing import ClassVar
import alignjax as aj

quickstart = aj.load_module({quickstart!r}).get_config(small=True)

@dataclasses.dataclass(frozen=True)
class Method:
    judge: ClassVar[None] = None

    def check(self, task):
        {method}

def loss(logp, reference_logp, mask, preference):
    {loss}

def get_config():
    task = dataclasses.replace(quickstart.task, {task})
    labels = dataclasses.replace(quickstart.stages["pairs"], method=Method())
    arm = dataclasses.replace(quickstart.stages["nash_md"], objective=aj.PreferenceGradient(loss))
    zero = aj.ZeroShotPreference("base")
    return dataclasses.replace(quickstart, task=task).with_stages(pairs=labels, nash_md=arm, zero=zero)
"""
TEMPLATE = "template=quickstart.task.template._replace(other='')"


@pytest.mark.parametrize(
    ("method", "loss", "task", "message"),
    [
        ("raise aj.UserError('no key; set KEY')", "pass", "", "pairs.method: no key; set KEY"),
        ("pass", "raise aj.UserError('no sign; give one')", "", "nash_md.objective: no sign; give one"),
        ("pass", "pass", "template=None", "preference: task 'sandbox-harmless' has no template"),
        ("pass", "raise ValueError('one token')", TEMPLATE, "zero: form=choice needs both answers"),
        ("pass", "pass", "format=quickstart.task.format._replace(stop='Human')", "stop='Human'"),
    ],
)
def test_a_user_s_method_objective_or_task_is_refused_before_anything_runs(
    capfd, tmp_path, method, loss, task, message
):
    """A ValueError of an objective that is given one token is no refusal."""
    (tmp_path / "own.py").write_text(OWN.format(quickstart=QUICKSTART, method=method, loss=loss, task=task))
    assert message in refused(capfd, "run", str(tmp_path / "own.py"), "--workdir", str(tmp_path / "w"))
    assert not (tmp_path / "w").exists()


def test_help_shows_the_documentation_and_the_settings_of_a_file(capfd):
    assert main(["run", QUICKSTART, "--help"]) == 0
    message = capfd.readouterr().out
    assert "The straight line on two cores" in message and "  small = False" in message
    assert "nash_md.objective.loss.tau = 0.02" in message and "mesh.fsdp = 1" in message
    assert "nash_md.data.samplers.1.role = POLICY" in message and "nash_md.data.samplers.1.beta = 0.25" in message
    stories = str(EXPERIMENTS / "stories.py")
    assert main(["run", stories, "--help"]) == 0
    message = capfd.readouterr().out
    assert "checkpoint (required)" in message and "principle = 'girl'" in message
    assert "give --set checkpoint=... and --set openings=... with --help" in message


@pytest.mark.parametrize("words", ["--help", "rnu", "plan --help", "compare a b", "run x.py --process one"])
def test_help_and_usage_errors_answer_without_importing_jax(environment, words):
    code = "import sys, alignjax.cli\ntry: alignjax.cli.main(sys.argv[1:])\nfinally: assert 'jax' not in sys.modules"
    command = [sys.executable, "-c", code, *words.split()]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert "AssertionError" not in done.stderr and "usage: alignjax" in done.stdout + done.stderr


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Returns a work folder with a base that was trained for four steps."""
    folder = tmp_path_factory.mktemp("short")
    assert main(["run", QUICKSTART, "--workdir", str(folder), "--only", "base", *settings(*SHORT)]) == 0
    return folder


def test_a_finished_stage_is_skipped_and_a_changed_one_refused_or_redone(capfd, short_run):
    argv = ["run", QUICKSTART, "--workdir", str(short_run), "--only", "base", *settings(*SHORT)]
    before = (short_run / "base" / "stage.json").read_text()
    assert main(argv) == 0
    assert "finished before" in capfd.readouterr().err
    assert main([*argv, *settings("base.loop.log_every=1")]) == 0  # what changes no result is no change
    message = refused(capfd, *argv, *settings("base.adam.lr=0.01"))
    assert re.search(r"adam\.lr=0\.00\d+, now 0\.01", message) and "--redo" in message
    assert (short_run / "base" / "stage.json").read_text() == before
    record = json.loads(before)
    assert record["finished"] and record["seed"] == 0 and record["code"] and record["config"]["kind"] == "Pretrain"


def test_a_refused_start_leaves_the_finished_stage_and_no_record(capfd, short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "w")
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), *settings(*SHORT)]
    before = (tmp_path / "w" / "base" / "stage.json").read_text()
    late = settings("base.model.vocab_size=100")  # only the tokenizer's training shows that it is too small
    assert "is below" in refused(capfd, *argv, "--only", "base", "--redo", *late)
    assert (tmp_path / "w" / "base" / "stage.json").read_text() == before
    assert "not finished in" in refused(capfd, *argv, "--only", "nash_md", "--redo")
    assert {path.name for path in (tmp_path / "w").iterdir() if path.is_dir()} <= {"base", "compiled"}


def test_a_gradient_that_is_not_finite_ends_the_run(capfd, tmp_path):
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path), "--only", "base", *settings(*SHORT, "base.adam.lr=1e30")]
    message = [refused(capfd, *argv) for _ in range(2)]  # and so does the resumed one
    assert re.search(r"base: the gradient of step 2 is (nan|inf); lower base\.adam\.lr \(now 1e\+30\)", message[0])
    assert message[0] == message[1] and not (tmp_path / "base" / "params").exists()
    assert {p.name for p in (tmp_path / "base" / "checkpoints").iterdir()} == {"1", "2"}


def test_a_stage_at_work_elsewhere_is_left_alone(capfd, short_run):
    argv = ["run", QUICKSTART, "--workdir", str(short_run), "--only", "base", *settings(*SHORT)]
    with (short_run / ".base.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "stage 'base' in" in (message := refused(capfd, *argv)) and "at work in another process" in message
    assert main(argv) == 0


def test_redo_makes_a_changed_stage_again(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "w")
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), "--only", "base", "--redo", *settings(*SHORT)]
    assert main([*argv, *settings("base.loop.steps=3")]) == 0
    rows = (tmp_path / "w" / "base" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]


WORKER = """
import dataclasses
from typing import ClassVar
import alignjax as aj

@dataclasses.dataclass(frozen=True)
class Worker:
    value: int
    makes: ClassVar[aj.Kind] = aj.Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {}

    def network(self, context):
        return None

    def exposure(self, context):
        return aj.Exposure()

    def check(self, context):
        pass

    def programs(self, context):
        return ()

    def run(self, context, programs):
        resumed = (work := context.folder / "work").exists()
        work.write_text(str(self.value))
        if self.value == 3 and not resumed:
            raise OSError("no more room")
        if self.value > 1:
            raise aj.UserError(f"value={self.value} cannot be; choose 1")
        return {}

def get_config():
    return aj.Experiment(task=None, stages={"it": Worker(1)})
"""


def test_the_old_stage_comes_back_when_the_new_one_is_refused_after_work(capfd, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    argv = ["run", str(tmp_path / "worker.py"), "--workdir", str(tmp_path / "w"), "--redo"]
    work = tmp_path / "w" / "it" / "work"
    assert main(argv) == 0
    capfd.readouterr()
    assert "value=2 cannot be" in refused(capfd, *argv, *settings("it.value=2"))
    assert work.read_text() == "1" and main(argv) == 0 and "it: finished before" in capfd.readouterr().err
    for message in ("no more room", "value=3 cannot be"):  # what an interrupted or resumed one did is kept
        assert message in refused(capfd, *argv, *settings("it.value=3"))
        assert work.read_text() == "3"
    assert "value=2 cannot be" in refused(capfd, *argv, *settings("it.value=2"))
    assert work.read_text() == "1" and main(argv) == 0
    assert {path.name for path in work.parents[1].iterdir() if path.is_dir()} <= {"it", "compiled"}


def test_a_stage_that_was_only_begun_is_no_input(capfd, short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "w")
    record = tmp_path / "w" / "base" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), "--only", "pairs", *settings(*SHORT)]
    assert "needs 'base', which is not finished" in refused(capfd, *argv)
    record.write_text("[]")
    assert "stage.json is damaged" in refused(capfd, *argv)


def test_a_table_is_of_the_very_configuration_and_its_files_whole(capfd, tmp_path):
    study = EXPERIMENTS / "nlhf" / "diversity.py"
    argv = ["run", str(study), "--workdir", str(tmp_path), *settings("diversity.function.points=3")]
    assert main(argv) == 0
    assert main(["table", *argv[1:]]) == 0 and "Bradley-Terry" in capfd.readouterr().out
    message = refused(capfd, "table", *argv[1:4], *settings("diversity.function.points=4"))
    assert "was made with function.points=3, now 4" in message
    record = tmp_path / "diversity" / "stage.json"
    tournament = json.loads(record.read_text())
    tournament["config"]["kind"] = "Tournament"
    record.write_text(json.dumps(tournament))
    for text in (None, "{"):
        if text:
            (tmp_path / "diversity" / "win_rates.json").write_text(text)
        assert "win_rates.json is missing or damaged" in refused(capfd, "table", *argv[1:])


@pytest.mark.parametrize("part", ["params", "model.json", "tokenizer", "stage.json"])
def test_a_damaged_result_is_named(capfd, short_run, tmp_path, part):
    shutil.copytree(short_run, tmp_path / "w")
    for path in [
        p for p in [tmp_path / "w" / "base" / part, *(tmp_path / "w" / "base" / part).rglob("*")] if p.is_file()
    ]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), "--only", "pairs", *settings(*SHORT)]
    assert str(tmp_path / "w" / "base") in refused(capfd, *argv)
    assert not (tmp_path / "w" / "pairs" / "data").exists()


@pytest.mark.parametrize(
    "verb, platform", [("run", "rocm"), ("table", "rocm"), ("sample", "rocm"), ("compare", "cpuu")]
)
def test_a_platform_that_is_not_here_is_named(tmp_path, environment, short_run, verb, platform):
    base = str(short_run / "base")
    (tmp_path / "prompts.txt").write_text("A cat\n")
    words = {
        "run": [QUICKSTART, "--workdir", str(tmp_path / "w")],
        "table": [QUICKSTART, "--workdir", str(tmp_path / "w")],
        "sample": [base, "--prompt", "A cat"],
        "compare": [base, base, "--prompts", str(tmp_path / "prompts.txt")],
    }[verb]
    command = [sys.executable, "-m", "alignjax", verb, *words]
    asked = {**environment(), "JAX_PLATFORMS": platform}
    done = subprocess.run(command, env=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("alignjax:")]
    assert f"JAX_PLATFORMS={platform}" in message and "alignjax[gpu]" in message
    assert not (tmp_path / "w" / "base").exists()


def subprocess_command(folder, *changes):
    """Returns the command that pretrains the base in a process of its own."""
    return [
        sys.executable, "-m", "alignjax", "run", QUICKSTART, "--workdir", str(folder), "--only", "base",
        *settings(*SHORT, *changes),
    ]  # fmt: skip


@pytest.mark.parametrize("error", [MemoryError("no room for 9 TB"), JaxRuntimeError("RESOURCE_EXHAUSTED: 9 TB")])
def test_too_little_memory_is_reported_in_one_line(capfd, monkeypatch, error):
    def fail(arguments):
        raise error

    monkeypatch.setitem(cli.COMMANDS, "export", fail)
    answer = refused(capfd, "export", "a", "b")
    assert answer.startswith("alignjax: out of memory (") and "9 TB); make batches" in answer


def test_an_export_to_a_full_disk_is_reported_in_one_line(tmp_path, environment, short_run):
    command = [sys.executable, "-m", "alignjax", "export", str(short_run / "base"), str(tmp_path / "out")]
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "limited", *command]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    (message,) = done.stderr.splitlines()
    assert done.returncode == 2 and "cannot be written (" in message and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("words", "status"), [("--help >&-", 0), ("run x.py --set nonsense --help 2>/dev/full", 2)])
def test_a_closed_output_is_no_output(environment, words, status):
    command = ["bash", "-c", f'"{sys.executable}" -m alignjax {words}']
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.returncode == status and "Traceback" not in done.stderr


def test_a_full_disk_is_reported_in_one_line(tmp_path, environment):
    """A limit of 50 kB a file stands for a full disk."""
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "limited", *subprocess_command(tmp_path)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "alignjax:" in done.stderr.splitlines()[-1]
    record = tmp_path / "base" / "stage.json"
    assert not record.exists() or not json.loads(record.read_text())["finished"]


def test_an_interrupt_is_reported_with_how_to_continue(tmp_path, environment):
    process = subprocess.Popen(
        subprocess_command(tmp_path, "base.loop.steps=2000"), stderr=subprocess.PIPE, text=True, env=environment()
    )
    rows = tmp_path / "base" / "metrics.jsonl"
    end = time.time() + 200
    while (
        process.poll() is None and time.time() < end and (not rows.exists() or len(rows.read_text().splitlines()) < 3)
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "goes on from the last save" in message and "Traceback" not in message


@pytest.mark.parametrize(
    "interruption",
    [
        # A callback's exception is printed and lost: what XLA's gc callback does to a KeyboardInterrupt.
        "gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT)); cli.main = gc.collect",
        "cli.main = lambda: signal.raise_signal(signal.SIGINT)",
        # While a library is imported, which takes a second or more.
        "cli.main = lambda: __import__('jax'); assert 'jax' not in sys.modules\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)",
    ],
)
def test_an_interrupt_at_any_moment_ends_the_process(environment, interruption):
    code = (
        "import gc, os, signal, sys, alignjax; from alignjax import __main__, cli\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        f"{interruption}\n__main__.entry_point(); signal.pause() if 'ITIMER' in {interruption!r} else None\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "nowhere.py"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1].startswith("alignjax: interrupted") and "Traceback" not in done.stderr


def stories_command(tmp_path, checkpoint, openings):
    """Returns the arguments that run the stories experiment."""
    values = settings(f"checkpoint={checkpoint}", f"openings={openings}")
    return ["run", str(EXPERIMENTS / "stories.py"), "--workdir", str(tmp_path / "w"), "--only", "base", *values]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no openings"),
        ('{"prompt": "x"}\n', "line 1"),
        ("not json\n", "line 1"),
        ('{"prompt": "x", "story": 3}\n\n{"prompt": null, "story": 4}\n', "line 3"),
        ('{"prompt": " ", "story": 3}\n', "line 1"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_data_file_is_named(capfd, tmp_path, text, message):
    path = tmp_path / "openings.jsonl"
    if text is not None:
        path.write_text(text)
    answer = refused(capfd, *stories_command(tmp_path, tmp_path, path))
    assert str(path) in answer and message in answer
    assert not (tmp_path / "w").exists()


@pytest.fixture
def checkpoint(tmp_path):
    """Returns the folder of a tiny Llama with a tokenizer."""
    config = dataclasses.replace(TINY, vocab_size=320)
    tokenizer = huggingface.train_tokenizer(["\n once a upon a", "\n a time"] * 9, 300, [])
    huggingface.write_folder(tmp_path / "tiny", config, decoder(config).init(jax.random.key(0)), tokenizer)
    return tmp_path / "tiny"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["task.template.answer=two words here"], "task.template.answer: 'two words here' is"),
        (["task.format.stop=<eos>"], "stops at the tokenizer's end token, and it has none"),
    ],
)
def test_what_a_known_tokenizer_lacks_is_reported_before_anything_runs(capfd, tmp_path, checkpoint, changes, message):
    (tmp_path / "openings.jsonl").write_text(
        "".join(json.dumps({"prompt": "Once.", "story": i}) + "\n" for i in range(9))
    )
    edit(checkpoint / "generation_config.json", eos_token_id=None)
    edit(checkpoint / "config.json", eos_token_id=None)
    edit(checkpoint / "tokenizer_config.json", eos_token=None)
    argv = ["run", str(EXPERIMENTS / "stories.py"), "--workdir", str(tmp_path / "w")]
    argv += settings(f"checkpoint={checkpoint}", f"openings={tmp_path / 'openings.jsonl'}", *changes)
    assert message in refused(capfd, *argv)
    assert not (tmp_path / "w").exists()


def test_a_tokenizer_that_is_not_read_for_its_config_names_that(checkpoint):
    edit(checkpoint / "config.json", tie_word_embeddings="no")
    with pytest.raises(UserError, match=r"config\.json has an invalid value .*tie_word_embeddings.*; correct it"):
        huggingface.read_tokenizer(checkpoint)


def test_help_without_a_file_is_that_of_the_command(capfd):
    for command in ("run", "table"):
        with pytest.raises(SystemExit) as end:
            main([command, "--help"])
        out = capfd.readouterr().out
        assert end.value.code == 0 and f"usage: alignjax {command}" in out and "--keep-going" in out
        with pytest.raises(SystemExit) as end:
            main([command])
        assert end.value.code == 2 and "FILE is missing; give an experiment" in capfd.readouterr().err
