"""Pairs go out and come back: JSON lines and parquet, labels hard and soft, texts and chats."""

import dataclasses
import json
import re
import shutil
import sys

import pyarrow
import pyarrow.parquet
import pytest

import alignjax as aj
from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.pipeline.run import run
from alignjax.tasks import dialogue, dialogue_format
from alignjax.tasks.json_lines import read_rows
from alignjax.training import data
from tests.test_cli import refused
from tests.test_summary import write_rows

TEXTS = ["yes", "no\nnever", "naïve 😀", ' "quoted" ', "a\u2028b"]
DIALOGUES = ["Human: {}\n\nAssistant:", "Human: red\n\nAssistant: blue\n\nHuman: {}\n\nAssistant:"]


def pairs(soft):
    """Ten pairs of five prompts; float32 holds every label."""
    labels = [0.25, 1.0, 0.5, 0.0, 0.9375] if soft else [1.0, 0.0, 1.0, 0.0, 0.0]
    return [
        {"prompt": DIALOGUES[i % 2].format(i % 5), "first": TEXTS[i % 5], "second": f"other {i}", "p": labels[i % 5]}
        for i in range(10)
    ]


def messages_of_my_own(prompt):
    return [{"role": "user", "content": prompt}]


def task(**changes):
    return dataclasses.replace(dialogue.dialogue_task(), source=None, **changes)


def load(workdir, path, used=None, **fields):
    """Runs a stage LoadPairs over a file; returns its folder."""
    run(aj.Experiment(used or task(), {"pairs": aj.LoadPairs(str(path), **fields)}), workdir)
    return workdir / "pairs"


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Stages of hard and of soft labels; the soft one holds pairs out."""
    folder = tmp_path_factory.mktemp("pairs")
    files = {soft: write_rows(folder / f"{soft}.jsonl", pairs(soft)) for soft in (False, True)}
    return {soft: load(folder / f"w{soft}", file, held_out=0.4 * soft) for soft, file in files.items()}


def export(stage, file, *options):
    assert main(["export", str(stage), str(file), *options]) == 0
    return file


def read_plainly(file):
    """Reads a file of rows without this package."""
    if file.suffix == ".parquet":
        return pyarrow.parquet.read_table(file).to_pylist()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


def kept(stage, split="train"):
    """Returns the pairs of a stage, sorted: TFDS shuffles the rows that it writes."""
    return ordered(data.read_pairs(stage / "data", split))


def unlabelled(rows):
    """Returns pairs as a dataset has them that no labelling method made."""
    return [{**row, "affix": -1, "positive": -1} for row in rows]


def ordered(rows):
    return sorted(rows, key=lambda row: str(row["prompt"]))


def preferred_first(rows):
    return [row if row["p"] else {**row, "first": row["second"], "second": row["first"], "p": 1.0} for row in rows]


both = pytest.mark.parametrize("suffix", ["jsonl", "parquet"])


@both
@pytest.mark.parametrize(("soft", "split"), [(True, "train"), (True, "held_out"), (False, "train")])
def test_labelled_pairs_come_back_as_they_were(stages, tmp_path, suffix, soft, split, capfd):
    rows = kept(stages[soft], split)
    file = export(stages[soft], tmp_path / f"out.{suffix}", "--labels", "--split", split)
    assert unlabelled(ordered(read_plainly(file))) == rows
    assert list(read_plainly(file)[0]) == ["prompt", "first", "second", "p"]
    assert kept(load(tmp_path / "w", file)) == rows
    assert f"{len(rows)} pairs of the split {split}, as {{prompt, first, second, p}}" in capfd.readouterr().out


def test_the_splits_together_are_the_pairs(stages):
    assert ordered(kept(stages[True]) + kept(stages[True], "held_out")) == ordered(unlabelled(pairs(True)))
    assert kept(stages[False]) == ordered(unlabelled(pairs(False)))


@both
def test_hard_labels_become_chosen_and_rejected_and_come_back_with_the_winner_first(stages, tmp_path, suffix):
    file = export(stages[False], tmp_path / "new" / f"out.{suffix}")
    found = read_plainly(file)
    assert all(list(row) == ["prompt", "chosen", "rejected"] for row in found)
    for row, pair in zip(ordered(found), ordered(pairs(False)), strict=True):
        won, lost = ("first", "second") if pair["p"] == 1 else ("second", "first")
        assert row == {"prompt": pair["prompt"], "chosen": pair[won], "rejected": pair[lost]}
    once = load(tmp_path / "once", file)
    assert kept(once) == ordered(unlabelled(preferred_first(pairs(False))))
    again = load(tmp_path / "again", export(once, tmp_path / f"again.{suffix}"))
    assert kept(again) == kept(once)


@both
def test_chats_have_the_turns_of_the_task(stages, tmp_path, suffix):
    found = read_plainly(export(stages[False], tmp_path / f"out.{suffix}", "--messages"))
    texts = read_plainly(export(stages[False], tmp_path / f"texts.{suffix}"))
    earlier = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "blue"}]
    for row, text in zip(found, texts, strict=True):
        last = {"role": "user", "content": re.search(r"Human: (\d)", text["prompt"])[1]}
        assert row["prompt"] == ([*earlier, last] if "red" in text["prompt"] else [last])
        for side in ("chosen", "rejected"):
            assert row[side] == [{"role": "assistant", "content": text[side]}]


@both
def test_dialogues_of_several_turns_come_back_from_chats(stages, tmp_path, suffix):
    file = export(stages[False], tmp_path / f"out.{suffix}", "--messages")
    assert kept(load(tmp_path / "w", file, read=dialogue.read_chat_comparison)) == ordered(
        unlabelled(preferred_first(pairs(False)))
    )
    with pytest.raises(UserError, match=r"(line|row) \d+ has a 'prompt' of other messages than one of the user"):
        load(tmp_path / "again", file)


SYSTEM, USER, ASSISTANT = ({"role": role, "content": role[0]} for role in ("system", "user", "assistant"))


@pytest.mark.parametrize("messages", [
    [USER], [USER, ASSISTANT, USER], [SYSTEM, USER], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
])  # fmt: skip
def test_a_dialogue_and_its_messages_are_inverse(messages):
    prompt = dialogue_format.dialogue_prompt([(m["role"], m["content"]) for m in messages])
    assert dialogue_format.dialogue_messages(prompt) == messages
    row = {"prompt": messages, "chosen": [*messages, ASSISTANT], "rejected": "b"}
    assert dialogue.read_chat_comparison(row) == (prompt, "a", "b", 1.0)


@pytest.mark.parametrize("messages", [
    [ASSISTANT, SYSTEM], [USER, SYSTEM], [SYSTEM], [{"role": "user", "content": "a\n\nHuman: b"}],
    [{"role": "tool", "content": "x"}], [{"role": "user", "content": " x"}],
])  # fmt: skip
def test_messages_that_are_no_dialogue_are_refused(messages):
    with pytest.raises(ValueError, match="has a 'prompt' that is no dialogue of a user and an assistant"):
        dialogue.read_chat_comparison({"prompt": messages, "chosen": "a", "rejected": "b"})


@both
def test_chats_of_one_message_come_back(tmp_path, suffix):
    """A task without a function of its own asks the whole prompt as one message."""
    plain = aj.Task("plain", source=None, format=aj.Format(" ", "\n", ("\n",)))
    stage = load(tmp_path / "w", write_rows(tmp_path / "in.jsonl", preferred_first(pairs(False))), plain)
    file = export(stage, tmp_path / f"out.{suffix}", "--messages")
    assert all([message["role"] for message in row["prompt"]] == ["user"] for row in read_plainly(file))
    assert kept(load(tmp_path / "back", file)) == ordered(unlabelled(preferred_first(pairs(False))))


def test_what_a_row_of_a_parquet_file_lacks_is_named_with_its_number(tmp_path):
    """A column of some rows is absent from the others, and errors are those of JSON lines."""
    rows = [{"prompt": "x", "chosen": "a", "rejected": "b"}, {"prompt": "x", "first": "a", "second": "b", "p": 0.5}]
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema_of(rows)), file)
    assert aj.LoadPairs(str(file)).digest
    found = read_rows(str(file), "comparisons", aj.LoadPairs("").read)
    assert found == [("x", "a", "b", 1.0), ("x", "a", "b", 0.5)]
    for change, message in (({"second": None}, "row 3 has no 'second'"), ({"p": 1.5}, "row 3 has 'p' 1.5, which is")):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([*rows, {**rows[1], **change}], schema_of(rows)), file)
        with pytest.raises(UserError, match=message):
            load(tmp_path / "w", file)
    assert not (tmp_path / "w").exists()


def schema_of(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    return pyarrow.schema([(name, pyarrow.float64() if name == "p" else pyarrow.string()) for name in names])


@pytest.mark.parametrize("content", [b"", b"PAR1", b'{"prompt": "x"}\n', None])
def test_a_file_that_is_no_parquet_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "a.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(
        UserError, match=r"pairs: .*a\.parquet cannot be read \(.*\); give a parquet file of compar"
    ) as e:
        load(tmp_path / "w", file)
    assert "\n" not in str(e.value)


def test_a_parquet_file_without_rows_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array([], pyarrow.string())}), file)
    with pytest.raises(UserError, match=r"a\.parquet holds no comparisons; give a parquet file of them"):
        load(tmp_path / "w", file)


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch, stages, capfd):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"a\.parquet needs pyarrow; pip install 'alignjax\[parquet\]'"):
        load(tmp_path / "w", tmp_path / "a.parquet")
    assert "pip install 'alignjax[parquet]'" in refused(
        capfd, "export", str(stages[False]), str(tmp_path / "b.parquet")
    )
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_is_said_in_one_line_and_nothing_is_left(stages, tmp_path, capfd):
    def answer(soft, name, *options):
        return refused(capfd, "export", str(stages[soft]), str(tmp_path / "new" / name), *options)

    assert "4 of the 6 labels of" in (message := answer(True, "a.jsonl")) and "are soft" in message
    assert "add --labels" in message
    assert "name a file that ends in .jsonl or .parquet, not" in answer(False, "folder")
    assert "holds no readable split 'test' of pairs" in answer(False, "a.jsonl", "--split", "test")
    assert "--merge is for adapters" in answer(False, "a.jsonl", "--merge")
    assert not (tmp_path / "new").exists()
    export(stages[False], tmp_path / "a.jsonl")
    assert "a.jsonl exists; choose another file" in refused(
        capfd, "export", str(stages[False]), str(tmp_path / "a.jsonl")
    )
    assert "--split is for a stage of pairs" in refused(
        capfd, "export", str(tmp_path), str(tmp_path / "b.jsonl"), "--split", "train"
    )
    with pytest.raises(SystemExit):
        main(["export", str(stages[False]), str(tmp_path / "b.jsonl"), "--labels", "--messages"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_the_messages_of_a_task_that_a_user_wrote_are_not_guessed(tmp_path, capfd):
    file = write_rows(tmp_path / "in.jsonl", pairs(False))
    stage = load(tmp_path / "w", file, task(messages=messages_of_my_own))
    message = refused(capfd, "export", str(stage), str(tmp_path / "a.jsonl"), "--messages")
    assert "messages=messages_of_my_own#" in message and "leave out --messages" in message
    assert len(read_plainly(export(stage, tmp_path / "a.jsonl"))) == 10


def test_an_unfinished_stage_is_not_exported(stages, tmp_path, capfd):
    shutil.copytree(stages[False], tmp_path / "pairs")
    record = json.loads((tmp_path / "pairs" / "stage.json").read_text())
    (tmp_path / "pairs" / "stage.json").write_text(json.dumps({**record, "finished": False}))
    assert "is not finished; run it first" in refused(
        capfd, "export", str(tmp_path / "pairs"), str(tmp_path / "a.jsonl")
    )
