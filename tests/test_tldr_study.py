"""The study of Table 1 of 2312.00886 from the first fine-tuning to the table, on T5s of a few thousand numbers."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.checkpoints import huggingface
from alignjax.cli import main
from alignjax.models.build import build
from alignjax.pipeline.config import load, load_module
from alignjax.pipeline.run import run
from alignjax.pipeline.stages.pair_batches import PairLimits, encode_pairs
from alignjax.tasks import summary
from alignjax.training.metrics import read_metrics
from tests.test_summary import write_rows

EXPERIMENTS = Path(__file__).parents[1] / "experiments" / "nlhf"
TABLE_1 = EXPERIMENTS / "table_1.py"
T5 = aj.T5Config(
    vocab_size=400, width=16, layers=1, decoder_layers=1, heads=2, head_dim=8, hidden=24, activation="gelu_tanh",
    gated=True, tied=False, scaled_output=False, end_token=2,
)  # fmt: skip
ARMS = ("rlhf", "md1", "br", "ema1")  # rlhf draws as sp does
COMPARED = ("sft", "rlhf", "md1")  # in the table; all arms are trained
BUCKET = 32
LONG = "red one\ntwo " + "blue three " * 40


def post(i):
    return {
        "id": f"t3_{i}",
        "subreddit": "red",
        "title": f"one {i}",
        "post": f"two blue {i} red",
        "summary": f" red {i}",
    }


def compared(i, split, confidence):
    sides = [{"text": f" blue {i}", "policy": "a"}, {"text": f" red one {i}", "policy": "b"}]
    return {"info": post(i), "summaries": sides, "choice": i % 2, "split": split, "extra": {"confidence": confidence}}


def files(folder):
    """Writes what a user has: posts and comparisons; returns the settings that name them."""
    long = {**post(90), "post": LONG}
    talk = {**post(91), "summary": " red" * 60}
    rows = {
        "train": [*map(post, range(20)), long, talk],
        "test": [*map(post, range(40, 50)), {**long, "title": "another"}],
        "comparisons": [*(compared(i, "train", 5) for i in range(20)), {**compared(90, "train", 5), "info": long}],
        "held_out": [compared(60 + i, split, 1 + i % 9) for i in range(18) for split in ("valid1", "valid2")],
    }
    return {name: write_rows(folder / f"{name}.jsonl", found) for name, found in rows.items()}


def tiny(stage):
    """Returns a stage with few steps and short texts."""
    if isinstance(stage, aj.LoadCheckpoint):
        return dataclasses.replace(stage, remat="none", compute_dtype="float32")
    if isinstance(stage, aj.Tournament):
        policies = {name: name for name in COMPARED}
        return dataclasses.replace(
            stage, policies=policies, prompts=16, writing=dataclasses.replace(stage.writing, batch=8)
        )
    if isinstance(stage, aj.TrainPolicy):  # a random policy does not end its texts
        stage = dataclasses.replace(stage, data=dataclasses.replace(stage.data, unfinished_loses=False))
    if hasattr(stage, "loop"):
        adam = dataclasses.replace(stage.adam, lr=3e-3, warmup=0)
        return dataclasses.replace(stage, loop=aj.Loop(steps=2, batch=8, log_every=1), adam=adam)
    return stage


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The finished work folder, the experiment, and the tokenizer."""
    folder = tmp_path_factory.mktemp("tldr")
    settings, module = files(folder), load_module(EXPERIMENTS / "tldr_t5_xl.py")
    texts = [summary.fill_query(summary.TLDR_QUERY, summary.Post("red", "one 1", LONG))] * 3
    texts += ["Summary 1: red 1\nSummary 2: blue 2\nPreferred Summary: 1 2 1 2"] * 3
    tokenizer = huggingface.train_tokenizer(texts, T5.vocab_size, ())
    for number, name in enumerate(("policy", "reader", "rater")):
        params = jax.tree.map(lambda x: 2 * x, build(T5).init(jax.random.key(number)))
        huggingface.write_folder(folder / name, T5, params, tokenizer)
        settings[name] = str(folder / name)
    module.T5_LARGE = module.T5_XL = module.T5_XXL = T5
    module.POSTS, module.NEW_TOKENS = (BUCKET,), 6
    whole = module.get_config(**settings)
    stages = {name: tiny(stage) for name, stage in whole.stages.items() if name[:2] not in ("md", "em") or name in ARMS}
    experiment = dataclasses.replace(whole, stages=stages, mesh=aj.Mesh())
    run(experiment, folder / "run")
    return folder / "run", experiment, tokenizer


def figures(folder, stage):
    return json.loads((folder / stage / "stage.json").read_text())["figures"]


def test_every_line_is_used_or_counted(study):
    folder = study[0]
    sft = figures(folder, "sft")
    assert (sft["examples"], sft["too_long"], sft["shortened"]) == (21, 1, 1)  # a summary of 60 words is not cut
    assert figures(folder, "pairs")["pairs"] == 21 and figures(folder, "pairs")["skipped"] == 0
    truth = figures(folder, "truth")
    assert (truth["pairs"], truth["skipped"]) == (8, 28)  # confidences 1, 2, 8 and 9 of two nines in valid2
    for model in ("preference", "reward"):
        found = figures(folder, model)
        assert (found["pairs"], found["too_long"], found["shortened"]) == (21, 0, 1)
        assert found["held_out"]["n"] == 8
    for arm in ARMS:
        found = figures(folder, arm)
        assert (found["prompts"], found["too_long"], found["shortened"]) == (22, 0, 1)
    table = figures(folder, "table")
    assert (table["prompts"], table["too_long"], table["shortened"]) == (11, 0, 1)


def test_all_stages_read_the_long_post_alike(study):
    folder, experiment, tokenizer = study
    prompts = [row["prompt"] for row in json.loads((folder / "table" / "outputs.json").read_text())]
    assert all(len(tokenizer.encode(prompt)) <= BUCKET and prompt.endswith("\n\nTL;DR:") for prompt in prompts)
    (cut,) = (prompt for prompt in prompts if "TITLE: another\n" in prompt)
    assert "POST: red one\n\nTL;DR:" in cut
    info = {**post(90), "title": "another", "post": LONG}
    row = experiment.stages["pairs"].read({**compared(90, "train", 5), "info": info})._asdict()
    assert encode_pairs([row], tokenizer, experiment.task, PairLimits((BUCKET,), 38)).rows[0]["prompt"] == cut


def test_every_arm_begins_at_the_fine_tuned_policy_which_is_its_reference(study):
    folder = study[0]
    losses = [row["nll"] for row in read_metrics(folder / "sft" / "metrics.jsonl")]
    assert len(losses) == 2 and losses[1] < losses[0]
    for arm in ARMS:
        rows = read_metrics(folder / arm / "metrics.jsonl")
        assert [row["step"] for row in rows] == [0, 1]
        assert abs(rows[0]["kl"]) < 1e-4 < abs(rows[1]["kl"]), arm


def test_table_1_has_the_run_s_rates_of_the_column_over_the_row(study, tmp_path, capfd):
    folder = study[0]
    (judged,) = json.loads((folder / "table" / "win_rates.json").read_text())
    names, rate, kl = judged["policies"], np.array(judged["win_rate"]), judged["kl_to_reference"]
    assert main(["run", str(TABLE_1), "--workdir", str(tmp_path), "--set", f"run={folder}"]) == 0
    out = capfd.readouterr().out
    assert "## Table 1: P*" in out and "ours, summary, base 1" in out and "rater (n=11)" in out
    for name, tau in (("p_star", 0.0), ("p_tau", 0.008)):
        found = json.loads((tmp_path / name / "numbers.json").read_text())
        ours = {row[0]: dict(zip(found["header"], row, strict=True)) for row in found["rows"] if "ours" in row[1]}
        assert list(ours) == [name.upper() for name in COMPARED]
        for row, cells in ours.items():
            j = names.index(row.lower())
            for column in found["header"][3:]:
                if column == row or column.lower() not in names:
                    assert cells[column] == ""
                    continue
                i = names.index(column.lower())
                value, low, high = (float(x.strip("[,]")) for x in cells[column].split())
                assert value == pytest.approx(rate[i][j] - tau * kl[i] + tau * kl[j], abs=6e-4)
                assert low <= value <= high


def cells(finding):
    """Returns {(row, column): cell} of the rows of the paper."""
    header, rows = finding.numbers["header"], finding.numbers["rows"]
    return {(row[0], c): cell for row in rows if "paper" in row[1] for c, cell in zip(header, row, strict=True)}


def test_without_a_run_the_paper_s_cells_stand_alone_and_agree_with_each_other():
    """The known cells are those of facts seen elsewhere; nothing is filled in."""
    stages = load(TABLE_1, {}).stages
    star, tau = (cells(stages[name].function()) for name in ("p_star", "p_tau"))
    numbers = {key: float(cell) for key, cell in star.items() if cell.startswith(".")}
    assert len(numbers) == 32 and len([cell for cell in tau.values() if cell.startswith(".")]) == 5
    assert numbers[("SFT", "MD1")] == 0.982 and numbers[("RLHF", "MD1")] == 0.598 and numbers[("BR", "MD1")] == 0.837
    assert all(value > 0.9 for (row, _), value in numbers.items() if row == "SFT")  # every column beats SFT
    assert numbers[("RLHF", "RLHF")] == 0.5 and star[("MD2", "RLHF")] == ""
    assert tau[("BR", "MD1")] == ".921" and tau[("RLHF", "MD1")] == ".769" and tau[("BR", "RLHF")] == ".833"
    text = stages["p_star"].function().text
    assert "How often the column's policy beats the row's" in text and "n=2000" in text and "2312.00886" in text
    assert stages["p_star"].function().numbers["rows"][-1][:3] == ["", "ours", ""]


def test_a_partial_run_fills_its_cells_and_averaged_weights_have_columns_of_their_own(tmp_path):
    table = {"judge": "people", "policies": ["md3", "ema1_avg"], "n": 50, "win_rate": [[0.5, 0.25], [0.75, 0.5]],
             "low": [[0.5, 0.1], [0.6, 0.5]], "high": [[0.5, 0.4], [0.9, 0.5]], "mean_length": [9.0, 8.0],
             "kl_to_reference": [None, 3.0]}  # fmt: skip
    (tmp_path / "table").mkdir()
    record = {"finished": True, "config": {"kind": "Tournament"}, "figures": {}, "task": {"name": "summary"}}
    (tmp_path / "table" / "stage.json").write_text(json.dumps(record))
    (tmp_path / "table" / "win_rates.json").write_text(json.dumps([table]))
    stages = load(TABLE_1, {"run": str(tmp_path)}).stages
    star, tau = (stages[name].function().numbers for name in ("p_star", "p_tau"))
    ours = [dict(zip(star["header"], row, strict=True)) for row in star["rows"] if "ours" in row[1]]
    assert [(row["row"], row["judge"]) for row in ours] == [("MD3", "people (n=50)"), ("EMA1*", "people (n=50)")]
    assert ours[0]["EMA1*"] == "0.750 [0.600, 0.900]" and ours[1]["MD3"] == "0.250 [0.100, 0.400]"
    assert sum(bool(cell) for row in ours for cell in list(row.values())[3:]) == 2
    assert all(not any(row[3:]) for row in tau["rows"] if "ours" in row[1])  # a KL that was not measured
