"""The command line: what a user can get wrong is told in one line, with exit status 2 and nothing half-written."""

import fcntl
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from alignjax.commands import main

PROGRESS = r"\w+: +\d+%\||\w+: finished before|\w+: [\d.]+ s;"  # bars, and a line a stage
EXPERIMENTS = Path(__file__).parents[1] / "experiments"
QUICKSTART = str(EXPERIMENTS / "quickstart.py")
MOMENT = ["small=True", "base.documents=200", "base.loop.steps=4", "base.loop.save_every=1"]


def settings(*values):
    return [part for value in values for part in ("--set", value)]


def refused(capfd, *argv):
    """Runs the command in this process; returns the one line it answers."""
    assert main(argv) == 2
    lines = [line for line in re.split("[\r\n]", capfd.readouterr().err) if line and not re.match(PROGRESS, line)]
    assert len(lines) == 1 and lines[0].startswith("alignjax:"), lines
    return lines[0]


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--set", "nash_md.objective.tua=0.1"], "did you mean nash_md.objective.tau"),
        (["--set", "lr=0.1"], "adam.lr"),
        (["--set", "nash_md.objective.tau=big"], "is not a float"),
        (["--set", "nonsense"], "is not PATH=VALUE"),
        (["--only", "nash"], "unknown stage 'nash'; this experiment has base, pairs"),
        (["--set", "mesh.data=3"], "does not divide 8 devices"),
        (["--set", "mesh.tensor=0"], "positive sizes"),
        (["--set", "nash_md.preference=judgement"], "which is no stage"),
        (["--only", "nash_md"], "needs 'base', which is not finished"),
    ],
)
def test_a_wrong_word_is_named_with_its_mend(capfd, tmp_path, argv, told):
    assert told in refused(capfd, "run", QUICKSTART, "--workdir", str(tmp_path / "w"), *argv)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("base.loop.batch=6", "does not divide over data*fsdp=8"),
        ("base.loop.accumulate=3", "does not divide batch"),
        ("base.adam.schedule=linear", "choose cosine or constant"),
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
        ("pairs.prompts=-3", "Label.prompts=-3 must be"),
        ("pairs.writing.buckets=-3,104", "Writing.buckets=(-3, 104) must be"),
        ("pairs.writing.sampling.top_p=0.0", "Sampling.top_p=0.0 must be"),
        ("pairs.writing.max_new_tokens=0", "Writing.max_new_tokens=0 must be"),
        ("table.prompts=0", "Tournament.prompts=0 must be"),
    ],
)
def test_a_value_that_cannot_work_is_named(capfd, tmp_path, change, told):
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path), "--only", "base", *settings(*MOMENT[:3], change)]
    assert told in refused(capfd, *argv)
    assert not (tmp_path / "base" / "params").exists()


def test_missing_files_and_workdirs(capfd, tmp_path):
    small = ["run", QUICKSTART, *settings("small=True")]
    assert "is not a file" in refused(capfd, "run", str(tmp_path / "none.py"), "--workdir", str(tmp_path))
    assert "--workdir is missing" in refused(capfd, *small)
    assert "--workdir is missing" in refused(capfd, *small, "--workdir", "")
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refused(capfd, *small, "--workdir", str(tmp_path / "taken"))
    assert "alignjax:" in refused(capfd, *small, "--workdir", "/proc/alignjax")
    assert "is not finished" in refused(capfd, "table", QUICKSTART, "--workdir", str(tmp_path / "new"))


STAGE = "from alignjax.stages import Experiment\ndef get_config():\n    return Experiment(task=None, stages={stages})\n"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "defines no get_config()"),
        ("def get_config(:\n", "SyntaxError"),
        ("def get_config():\n    pass\n", "get_config() returned a NoneType; it must return an"),
        ("def get_config():\n    return {'seed': 1}\n", "returned a dict"),
        (STAGE.format(stages="{'a': 3}"), "stage 'a' is a int, which has no inputs() and run(context)"),
        (STAGE.format(stages="{'../a': 3}"), "'../a' cannot name a stage"),
        (STAGE.format(stages="{'compiled': 3}"), "'compiled' cannot name a stage"),
    ],
)
def test_what_is_no_experiment_is_named(capfd, tmp_path, text, told):
    (tmp_path / "mine.py").write_text(text)
    for words in ([], ["--help"]) if "cannot name" not in told and "is a int" not in told else ([],):
        argv = ["run", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "w"), *words]
        assert told in refused(capfd, *argv)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("table.judges.oracle=oracle:truth", "table: task 'sandbox-harmless' has no oracle:truth; it has oracle"),
        ("table.judges.held-out=preference", "name a held-out one"),
        ("table.policies.base=pairs", "stage 'table' needs a policy and 'pairs' makes pairs"),
        ("table.split=tests", "no split 'tests'"),
        ("nash_md.preference=base", "stage 'nash_md' needs a preference model and 'base' makes a policy"),
        ("nash_md.loop.batch=12", "nash_md.loop.batch=12 does not divide over data*fsdp=8"),
        ("nash_md.average_decay=high", "is not a float or None"),
        ("preference.pairs=base", "stage 'preference' needs pairs and 'base' makes a policy"),
        ("preference.truth=pairs", "truth and pairs are both 'pairs', which holds nothing out"),
        ("base.model.compute_dtype=float99", "choose one of float32, bfloat16, float16"),
        ("base.adam.lr=1e999", "Adam.lr=inf must be in [0, inf)"),
        ("smal=True", "did you mean small"),
    ],
)
def test_what_must_fail_is_told_before_anything_runs(capfd, tmp_path, change, told):
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), *settings("small=True", change)]
    assert told in refused(capfd, *argv)
    assert not (tmp_path / "w").exists()


def test_help_shows_what_a_file_is_and_what_it_can_set(capfd):
    assert main(["run", QUICKSTART, "--help"]) == 0
    told = capfd.readouterr().out
    assert "The straight line on two cores" in told and "  small = False" in told
    assert "nash_md.objective.tau = 0.02" in told and "mesh.fsdp = 1" in told
    stories = str(EXPERIMENTS / "stories.py")
    assert main(["run", stories, "--help"]) == 0
    told = capfd.readouterr().out
    assert "checkpoint must be given" in told and "principle = 'girl'" in told
    assert "when checkpoint and openings are given with --help" in told


@pytest.fixture(scope="module")
def moment(tmp_path_factory):
    """A workdir with a finished, all but untrained base."""
    folder = tmp_path_factory.mktemp("moment")
    assert main(["run", QUICKSTART, "--workdir", str(folder), "--only", "base", *settings(*MOMENT)]) == 0
    return folder


def test_a_finished_stage_is_skipped_and_a_changed_one_refused_or_redone(capfd, moment):
    argv = ["run", QUICKSTART, "--workdir", str(moment), "--only", "base", *settings(*MOMENT)]
    before = (moment / "base" / "stage.json").read_text()
    assert main(argv) == 0
    assert "finished before" in capfd.readouterr().err
    assert main([*argv, *settings("base.loop.log_every=1")]) == 0  # what changes no result is no change
    told = refused(capfd, *argv, *settings("base.adam.lr=0.01"))
    assert re.search(r"adam\.lr=0\.00\d+, now 0\.01", told) and "--redo" in told
    assert (moment / "base" / "stage.json").read_text() == before
    record = json.loads(before)
    assert record["finished"] and record["seed"] == 0 and record["code"] and record["config"]["kind"] == "Pretrain"


def test_a_refused_start_leaves_the_finished_stage_and_no_record(capfd, moment, tmp_path):
    shutil.copytree(moment, tmp_path / "w")
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), *settings(*MOMENT)]
    before = (tmp_path / "w" / "base" / "stage.json").read_text()
    late = settings("base.model.vocab_size=100")  # only the tokenizer's training shows that it is too small
    assert "is below" in refused(capfd, *argv, "--only", "base", "--redo", *late)
    assert (tmp_path / "w" / "base" / "stage.json").read_text() == before
    assert "finished in" in refused(capfd, *argv, "--only", "nash_md", "--redo")
    assert {path.name for path in (tmp_path / "w").iterdir() if path.is_dir()} <= {"base", "compiled"}


def test_a_gradient_that_is_not_finite_ends_the_run(capfd, tmp_path):
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path), "--only", "base", *settings(*MOMENT, "base.adam.lr=1e30")]
    told = [refused(capfd, *argv) for _ in range(2)]  # and so does the resumed one
    assert re.search(r"base: the gradient of step 2 is (nan|inf); lower base\.adam\.lr \(now 1e\+30\)", told[0])
    assert told[0] == told[1] and not (tmp_path / "base" / "params").exists()
    assert {p.name for p in (tmp_path / "base" / "checkpoints").iterdir()} == {"1", "2"}


def test_a_stage_at_work_elsewhere_is_left_alone(capfd, moment):
    argv = ["run", QUICKSTART, "--workdir", str(moment), "--only", "base", *settings(*MOMENT)]
    with (moment / ".base.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "stage 'base' in" in (told := refused(capfd, *argv)) and "at work in another process" in told
    assert main(argv) == 0


def test_redo_makes_a_changed_stage_again(moment, tmp_path):
    shutil.copytree(moment, tmp_path / "w")
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), "--only", "base", "--redo", *settings(*MOMENT)]
    assert main([*argv, *settings("base.loop.steps=3")]) == 0
    rows = (tmp_path / "w" / "base" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [0, 1, 2]


def test_a_stage_that_was_only_begun_is_no_input(capfd, moment, tmp_path):
    shutil.copytree(moment, tmp_path / "w")
    record = tmp_path / "w" / "base" / "stage.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "finished": False}))
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), "--only", "pairs", *settings(*MOMENT)]
    assert "needs 'base', which is not finished" in refused(capfd, *argv)
    record.write_text("[]")
    assert "stage.json is damaged" in refused(capfd, *argv)


def test_a_table_is_of_the_very_configuration_and_its_files_whole(capfd, tmp_path):
    study = EXPERIMENTS / "nlhf" / "diversity.py"
    argv = ["run", str(study), "--workdir", str(tmp_path), *settings("diversity.function.points=3")]
    assert main(argv) == 0
    assert main(["table", *argv[1:]]) == 0 and "Bradley-Terry" in capfd.readouterr().out
    told = refused(capfd, "table", *argv[1:4], *settings("diversity.function.points=4"))
    assert "was made with function.points=3, now 4" in told
    record = tmp_path / "diversity" / "stage.json"
    tournament = json.loads(record.read_text())
    tournament["config"]["kind"] = "Tournament"
    record.write_text(json.dumps(tournament))
    for text in (None, "{"):
        if text:
            (tmp_path / "diversity" / "win_rates.json").write_text(text)
        assert "win_rates.json is missing or damaged" in refused(capfd, "table", *argv[1:])


@pytest.mark.parametrize("part", ["params", "model.json", "tokenizer", "stage.json"])
def test_a_damaged_result_is_named(capfd, moment, tmp_path, part):
    shutil.copytree(moment, tmp_path / "w")
    for path in [
        p for p in [tmp_path / "w" / "base" / part, *(tmp_path / "w" / "base" / part).rglob("*")] if p.is_file()
    ]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    argv = ["run", QUICKSTART, "--workdir", str(tmp_path / "w"), "--only", "pairs", *settings(*MOMENT)]
    assert str(tmp_path / "w" / "base") in refused(capfd, *argv)
    assert not (tmp_path / "w" / "pairs" / "data").exists()


def subprocess_command(folder, *changes):
    return [
        sys.executable, "-m", "alignjax", "run", QUICKSTART, "--workdir", str(folder), "--only", "base",
        *settings(*MOMENT, *changes),
    ]  # fmt: skip


def test_a_full_disk_is_told_in_one_line(tmp_path, environment):
    """Files may not grow past 50 kB, as on a disk with no more room."""
    limited = ["bash", "-c", 'ulimit -f 50; exec "$@"', "limited", *subprocess_command(tmp_path)]
    done = subprocess.run(limited, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr and "alignjax:" in done.stderr.splitlines()[-1]
    record = tmp_path / "base" / "stage.json"
    assert not record.exists() or not json.loads(record.read_text())["finished"]


def test_an_interrupt_is_told_and_names_what_goes_on(tmp_path, environment):
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
    told = process.communicate(timeout=120)[1]
    assert process.returncode == 130 and "goes on from the last save" in told and "Traceback" not in told


@pytest.mark.parametrize(
    "moment",
    [
        # A callback's exception is printed and lost: what XLA's gc callback does to a KeyboardInterrupt.
        "gc.callbacks.append(lambda *_: signal.raise_signal(signal.SIGINT)); commands.main = gc.collect",
        "commands.main = lambda: signal.raise_signal(signal.SIGINT)",
        # While the command is imported, which takes a second or more.
        "for name in ('commands', 'run'): delattr(alignjax, name), sys.modules.pop(f'alignjax.{name}')\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.05)",
    ],
)
def test_an_interrupt_at_any_moment_ends_the_process(environment, moment):
    code = (
        "import gc, os, signal, sys, alignjax; from alignjax import __main__, commands\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))\n"
        f"{moment}\n__main__.main(); signal.pause() if 'ITIMER' in {moment!r} else None\n"
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


def stories(tmp_path, checkpoint, openings):
    values = settings(f"checkpoint={checkpoint}", f"openings={openings}")
    return ["run", str(EXPERIMENTS / "stories.py"), "--workdir", str(tmp_path / "w"), "--only", "base", *values]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no openings"),
        ('{"prompt": "x"}\n', "line 1"),
        ("not json\n", "line 1"),
        ('{"prompt": "x", "story": 3}\n\n{"prompt": null, "story": 4}\n', "line 3"),
        ('{"prompt": " ", "story": 3}\n', "line 1"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_data_file_is_named(capfd, tmp_path, text, told):
    path = tmp_path / "openings.jsonl"
    if text is not None:
        path.write_text(text)
    answer = refused(capfd, *stories(tmp_path, tmp_path, path))
    assert str(path) in answer and told in answer
    assert not (tmp_path / "w").exists()


def llama_folder(path, **changes):
    """A whole, tiny Llama checkpoint without a tokenizer."""
    path.mkdir()
    config = dict(
        model_type="llama", vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=6, rms_norm_eps=1e-5, tie_word_embeddings=True, hidden_act="silu",
    )  # fmt: skip
    (path / "config.json").write_text(json.dumps({**config, **changes}))
    block = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,),
        f"{block}input_layernorm.weight": (4,), f"{block}post_attention_layernorm.weight": (4,),
        f"{block}self_attn.q_proj.weight": (4, 4), f"{block}self_attn.k_proj.weight": (2, 4),
        f"{block}self_attn.v_proj.weight": (2, 4), f"{block}self_attn.o_proj.weight": (4, 4),
        f"{block}mlp.gate_proj.weight": (6, 4), f"{block}mlp.up_proj.weight": (6, 4),
        f"{block}mlp.down_proj.weight": (4, 6),
    }  # fmt: skip
    tensors = {name: np.ones(shape, np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, path / "model.safetensors")
    return tensors


def damage(path, tensors, how):
    weights = path / "model.safetensors"
    if how == "missing":
        weights.unlink()
    elif how == "pickle":
        weights.rename(path / "pytorch_model.bin")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif how == "misshapen":
        safetensors.numpy.save_file({**tensors, "model.norm.weight": np.ones(5, np.float32)}, weights)
    elif how == "lacking":
        safetensors.numpy.save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, weights)
    elif how == "extra":
        safetensors.numpy.save_file({**tensors, "model.layers.1.x": np.ones(1, np.float32)}, weights)
    elif how == "traversal":
        index = {"weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif how == "config":
        (path / "config.json").write_text('{"model_type": "llama"}')
    elif how.startswith("config "):
        (path / "config.json").write_text(how.removeprefix("config "))
    elif how.startswith("index "):
        (path / "model.safetensors.index.json").write_text(how.removeprefix("index "))


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", "model.safetensors is missing"),
        ("pickle", "convert it to safetensors"),
        ("truncated", "is damaged"),
        ("misshapen", "model.norm.weight has shape (5,)"),
        ("lacking", "q_proj.weight is missing"),
        ("extra", "model.layers.1.x has no place"),
        ("traversal", "points outside"),
        ("config", "lacks"),
        ("config []", "holds no JSON object"),
        ('config {"model_type": "llama", "rope_scaling": 3}', "rope_parameters=3"),
        ("index []", "holds no JSON object"),
        ("index {}", "has no weight_map"),
        ('index {"weight_map": {"a": 3}}', "has no weight_map"),
        ("index {", "cannot be read"),
        ("whole", "tokenizer cannot be read"),
    ],
)
def test_a_bad_checkpoint_is_named(capfd, tmp_path, how, told):
    openings = tmp_path / "openings.jsonl"
    openings.write_text('{"prompt": "Once.", "story": 3}\n')
    damage(tmp_path / "c", llama_folder(tmp_path / "c"), how)
    assert told in refused(capfd, *stories(tmp_path, tmp_path / "c", openings))
    assert not (tmp_path / "w" / "base" / "params").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "mistral"}, "'mistral' is not supported"),
        ({"attention_bias": True}, "attention_bias"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "llama3"),
        ({"quantization_config": {}}, "quantization_config"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers='2' is no whole number"),
        ({"hidden_size": 4.0}, "hidden_size=4.0 is no whole number"),
        ({"num_attention_heads": 0}, "holds a value that cannot be"),
        ({"rms_norm_eps": "small"}, "norm_eps='small' must be"),
    ],
)
def test_a_family_or_option_not_built_is_refused_by_name(capfd, tmp_path, change, told):
    openings = tmp_path / "openings.jsonl"
    openings.write_text('{"prompt": "Once.", "story": 3}\n')
    llama_folder(tmp_path / "c", **change)
    assert told in refused(capfd, *stories(tmp_path, tmp_path / "c", openings))
