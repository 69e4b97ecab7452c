"""HH dialogues and premises as TFDS datasets: what TFDS reads back, disjoint splits, and the figures."""

import json
import os
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from alignjax.errors import UserError
from alignjax.tasks.dialogue import Dialogues
from alignjax.tasks.outline import PremiseFile, Premises, outline_prompt
from alignjax.training import datasets
from tests.test_dialogue import HH, needs_data, row, write_rows


def read(name, split, folder):
    """Returns the rows that TFDS reads, texts decoded, in the order of their number."""
    source = tfds.data_source(name, split=split, data_dir=str(folder))
    rows = [{key: x.decode() if isinstance(x, bytes) else x for key, x in source[i].items()}
            for i in range(len(source))]  # fmt: skip
    return sorted(rows, key=lambda found: found["line" if "line" in found else "number"])


def metadata(name, folder):
    return tfds.builder_from_directory(str(folder / name / "1.0.0")).info.metadata


def test_dialogues_are_a_tfds_dataset_in_the_splits_of_their_prompts(tmp_path):
    test = [row(i, turn_count=1 + i % 2) for i in range(7)]
    test[1]["rejected"] = row(9)["rejected"]
    train = [row(2), row(30, chosen="é 😀"), row(31, rejected="")]
    source = Dialogues(write_rows(tmp_path / "a.jsonl", train), write_rows(tmp_path / "b.jsonl", test), held_out=3)
    figures = datasets.write_dialogues(tmp_path / "out", source)
    assert [(r["line"], r["same_prompt"]) for r in read("hh_rlhf", "validation", tmp_path / "out")] == [
        (1, True), (2, False), (3, True)
    ]  # fmt: skip
    assert [r["line"] for r in read("hh_rlhf", "test", tmp_path / "out")] == [4, 5, 6]
    prompt = "Human: Question {}?\n\nAssistant:"
    assert read("hh_rlhf", "train", tmp_path / "out") == [  # line 1 has a prompt of validation
        {"prompt": prompt.format(30), "chosen": "é 😀", "rejected": "No.", "line": 2, "same_prompt": True},
        {"prompt": prompt.format(31), "chosen": "Yes.", "rejected": "", "line": 3, "same_prompt": True},
    ]
    kinds = ("pairs", "multi_turn", "other_prompt", "empty_reply", "comparisons")
    assert {split: tuple(found[kind] for kind in kinds) for split, found in figures.items()} == {
        "train": (2, 0, 0, 1, 1), "validation": (3, 1, 1, 0, 2), "test": (3, 2, 0, 0, 3)
    }  # fmt: skip
    found = metadata("hh_rlhf", tmp_path / "out")
    assert found["figures"] == figures and found["files"]["digests"] == list(source.digests)


def test_what_cannot_become_a_dataset_leaves_no_folder(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(3)])
    bad = write_rows(tmp_path / "b.jsonl", [row(0), {"chosen": row(0)["chosen"]}])
    for source, words in {
        Dialogues(): "no file of dialogues is named; give Dialogues a ``train`` or a ``test``",
        Dialogues(test=path): r"a\.jsonl holds no dialogue of the test split",
        Dialogues(bad): r"b\.jsonl, line 2 has no 'rejected'",
    }.items():
        with pytest.raises(UserError, match=words):
            datasets.write_dialogues(tmp_path / "out", source)
    for counts in ({}, {"train": 0}):
        with pytest.raises(UserError, match="asks for nothing"):
            datasets.write_premises(tmp_path / "out", Premises(), counts, 0)
    with pytest.raises(UserError, match="no split 'dev'"):
        datasets.write_premises(tmp_path / "out", Premises(), {"dev": 1}, 0)
    assert not (tmp_path / "out").exists()
    assert list(datasets.write_dialogues(tmp_path / "out", Dialogues(path))) == ["train"]


def test_premises_are_a_tfds_dataset_with_their_prompts(tmp_path):
    source, counts = Premises("So:\n\n1."), {"train": 30, "test": 5}
    figures = datasets.write_premises(tmp_path, source, counts, seed=4)
    for split, count in counts.items():
        premises = source.premises(split, count, 4)
        assert read("outline_premises", split, tmp_path) == [
            {"premise": premise, "prompt": outline_prompt(premise, "So:\n\n1."), "number": number}
            for number, premise in enumerate(premises)
        ]
        words = [len(premise.split()) for premise in premises]
        assert figures[split] == {"premises": count, "shortest": min(words), "mean_words": sum(words) / count,
                                  "longest": max(words)}  # fmt: skip
    assert metadata("outline_premises", tmp_path) == {"seed": 4, "figures": figures}


@needs_data
def test_the_real_file_as_a_dataset(tmp_path):
    figures = datasets.write_dialogues(tmp_path, Dialogues(test=str(HH)))
    rows = [found for split in ("validation", "test") for found in read("hh_rlhf", split, tmp_path)]
    assert [found["line"] for found in rows[:1000]] == list(range(1, 1001)) and rows[-1]["line"] == 2000
    assert len(rows) == sum(found["pairs"] for found in figures.values())
    assert sum(not found["same_prompt"] for found in rows) == sum(found["other_prompt"] for found in figures.values())
    folder = Path(os.environ["ALIGNJAX_TEST_DATA"])
    lines = [json.loads(line)["prompt"] for line in (folder / "story_premises.jsonl").read_text().splitlines()]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    found = datasets.write_premises(tmp_path, PremiseFile(str(tmp_path / "a.txt")), {"train": 9999, "test": 9999}, 0)
    assert (found["train"]["shortest"], found["train"]["longest"]) == (8, 25)
