"""The command line: what a user can get wrong is told in one line, with exit status 2 and nothing half-written."""

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

from alignjax.run import main

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
QUICKSTART = str(EXPERIMENTS / "quickstart.py")
MOMENT = ["small=True", "base.documents=200", "base.loop.steps=4", "base.loop.save_every=1"]


def settings(*values):
    return [part for value in values for part in ("--set", value)]


def refused(capfd, *argv):
    """Runs the command in this process; returns the one line it answers."""
    assert main(argv) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("alignjax:")]
    assert len(lines) == 1
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
        ("base.loop.batch=0", "base.loop.batch=0: Loop.batch=0 must be in [1, inf]"),
        ("base.loop.log_every=0", "Loop.log_every=0 must be"),
        ("base.adam.lr=-1.0", "Adam.lr=-1.0 must be in [0, inf]"),
        ("base.adam.b1=2.0", "Adam.b1=2.0 must be in [0, 1]"),
        ("base.model.width=0", "TransformerConfig.width=0 must be"),
        ("task.source.two_turns=3.0", "World.two_turns=3.0 must be in [0, 1]"),
        ("pairs.prompts=-3", "Label.prompts=-3 must be"),
        ("pairs.writing.buckets.0=-3", "Writing.buckets=(-3, 104) must be"),
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
    assert "is not a file" in refused(capfd, "run", str(tmp_path / "none.py"), "--workdir", str(tmp_path))
    assert "--workdir is missing" in refused(capfd, "run", QUICKSTART)
    (tmp_path / "empty.py").write_text("x = 1\n")
    assert "get_config" in refused(capfd, "run", str(tmp_path / "empty.py"), "--workdir", str(tmp_path))
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert "SyntaxError" in refused(capfd, "run", str(tmp_path / "broken.py"), "--workdir", str(tmp_path))
    (tmp_path / "taken").write_text("a file")
    assert "taken" in refused(capfd, "run", QUICKSTART, "--workdir", str(tmp_path / "taken"))
    assert "alignjax:" in refused(capfd, "run", QUICKSTART, "--workdir", "/proc/alignjax")
    assert "is not finished" in refused(capfd, "table", QUICKSTART, "--workdir", str(tmp_path / "new"))


def test_help_shows_what_a_file_can_set(capfd):
    assert main(["run", QUICKSTART, "--help"]) == 0
    told = capfd.readouterr().out
    assert "nash_md.objective.tau = 0.02" in told and "mesh.fsdp = 1" in told


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
    assert not json.loads((tmp_path / "base" / "stage.json").read_text())["finished"]


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


def stories(tmp_path, checkpoint, openings):
    values = settings(f"checkpoint={checkpoint}", f"openings={openings}")
    return ["run", str(EXPERIMENTS / "stories.py"), "--workdir", str(tmp_path / "w"), "--only", "base", *values]


@pytest.mark.parametrize(
    ("text", "told"),
    [("", "holds no openings"), ('{"prompt": "x"}\n', "line 1"), ("not json\n", "line 1"), (None, "cannot be read")],
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
    ],
)
def test_a_family_or_option_not_built_is_refused_by_name(capfd, tmp_path, change, told):
    openings = tmp_path / "openings.jsonl"
    openings.write_text('{"prompt": "Once.", "story": 3}\n')
    llama_folder(tmp_path / "c", **change)
    assert told in refused(capfd, *stories(tmp_path, tmp_path / "c", openings))
