"""A tournament's figures beside the votes, what it keeps, and its replies in the formats of public evaluators."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.arguments import OUTPUT_FORMATS
from alignjax.cli import main
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.models.log_probs import log_prob
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.run import run
from alignjax.preferences.statistics import distinct_n, length_controlled_rate, mean_interval
from alignjax.preferences.tournament import win_rates
from alignjax.reporting import exchange, tables
from alignjax.reporting.report import write_report
from alignjax.sampling.generate import reply_scorer
from alignjax.tasks.dialogue_format import DIALOGUE_FORMAT, dialogue_messages
from tests.conftest import ragged
from tests.test_cli import refused
from tests.test_summary import write_rows
from tests.test_wiring import WORDS, experiment, longer, task

WRITING = aj.Writing(max_new_tokens=6, buckets=(96,), batch=8)
POLICIES = ("base", "mine", "third")


@dataclasses.dataclass(frozen=True)
class Chats:
    """Dialogues of one turn and of two."""

    def prompts(self, split, count, seed):
        once = [f"Human: {word}\n\nAssistant:" for word in WORDS[:4]]
        twice = [
            f"Human: {a}\n\nAssistant: {b}\n\nHuman: no\n\nAssistant:"
            for a, b in zip(WORDS[:4], WORDS[5:9], strict=True)
        ]
        return [*once, *twice][:count]


def soft(prompt, reply, other):
    """A judge with its own opinion of every two texts, antisymmetric."""
    return 1 / (1 + np.exp((len(set(other)) - len(set(reply))) / 4))


def visible(raw):
    """Replies as letters and spaces alone, so that words can be counted."""
    return re.sub(r"[^a-z ]", " ", raw.lower()).strip() or "x"


def table(**changes):
    fields = dict(
        policies={"mine": "other", "base": "base", "third": "other"}, reference="base", prompts=8, writing=WRITING,
        judges={"longer": aj.Oracle("longer"), "soft": aj.Oracle("soft")},
    )  # fmt: skip
    return aj.Tournament(**{**fields, **changes})


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two tournaments, one of plain sampling, over random networks."""
    folder, filtered = (
        tmp_path_factory.mktemp("exchange"),
        dataclasses.replace(WRITING, sampling=aj.Sampling(top_p=0.9)),
    )
    chats = task(
        source=Chats(), messages=dialogue_messages, format=DIALOGUE_FORMAT._replace(stop=(aj.EOS,)), clean=visible,
        oracles={"longer": longer, "soft": soft},
    )  # fmt: skip
    stages = {"table": table(), "filtered": table(writing=filtered, policies={"a": "other"}, judges=table().judges)}
    stages["ratings"] = aj.RatePool("table", bootstrap=5)
    run(dataclasses.replace(experiment(**stages), task=chats), folder)
    return folder


BEST_OF = [("red", ["aaa"], ["a", "b"], "Math"), ("blue", ["b"], ["cc", "d"], "Math"), ("one", ["xx"], ["yy"], "Focus")]


def test_a_judge_is_measured_on_a_file_of_right_and_wrong_replies(tmp_path):
    """Shares of the longest reply by hand: a win, a loss; a tie of two."""
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected, "subset": subset, "num_correct": len(chosen)}
        | {"total_completions": len(chosen) + len(rejected), "id": prompt}
        for prompt, chosen, rejected, subset in [*BEST_OF, ("no", ["x"], ["y"], "Ties")]
    ]
    path = write_rows(tmp_path / "a.jsonl", rows)
    stage = aj.MeasureBestOf(path, aj.Oracle("longer"), JudgeSizes(8, 32, 32))
    run(aj.Experiment(task(), {"measured": stage}), tmp_path / "w")
    figures = json.loads((tmp_path / "w" / "measured" / "stage.json").read_text())["figures"]
    assert figures == {"prompts": 4, "accuracy": 0.5, "subset": {"Focus": 0.5, "Math": 0.5}}
    write_rows(tmp_path / "a.jsonl", rows[3:])
    with pytest.raises(UserError, match=r"measured: .*a\.jsonl holds the subset Ties alone"):
        run(aj.Experiment(task(), {"measured": dataclasses.replace(stage)}), tmp_path / "v")


def read(workdir, name):
    return json.loads((workdir / "table" / name).read_text())


def texts(workdir):
    rows = read(workdir, "outputs.json")
    return [row["prompt"] for row in rows], {p: [row["replies"][p] for row in rows] for p in rows[0]["replies"]}


@pytest.mark.parametrize("index", [0, 1])
def test_every_probability_of_a_tournament_is_on_disk(workdir, index):
    judge = ("longer", "soft")[index]
    prompts, replies = texts(workdir)
    oracle, found = (longer, soft)[index], read(workdir, f"judgments-{judge}.json")
    assert [(row["policy"], row["other"]) for row in found] == [("base", "mine"), ("third", "mine"), ("third", "base")]
    for row in found:
        pairs = zip(prompts, replies[row["policy"]], replies[row["other"]], strict=True)
        np.testing.assert_allclose(row["probability"], [oracle(*pair) for pair in pairs])
    assert all(visible(raw) == text for p in POLICIES for raw, text in zip(
        read(workdir, f"replies-{p}.json")["text"], replies[p], strict=True))  # fmt: skip


@pytest.mark.parametrize("index", [0, 1])
def test_mean_probabilities_and_length_controlled_rates_are_those_of_the_kept_judgments(workdir, index):
    _, replies = texts(workdir)
    found = read(workdir, "win_rates.json")[index]
    mean, controlled = np.array(found["mean_probability"]), np.array(found["length_controlled"])
    np.testing.assert_array_equal(mean + mean.T, np.ones((3, 3)))
    np.testing.assert_array_equal(controlled + controlled.T, np.ones((3, 3)))
    names = found["policies"]
    assert names == ["mine", "base", "third"] and found["baseline"] == "base"
    for row in read(workdir, f"judgments-{found['judge']}.json"):
        i, j, p = names.index(row["policy"]), names.index(row["other"]), np.array(row["probability"])
        assert mean[i, j] == pytest.approx(p.mean())
        lengths = [[len(text) for text in replies[row[side]]] for side in ("policy", "other")]
        assert controlled[i, j] == pytest.approx(length_controlled_rate(p, *lengths))
        if row["other"] == "base":
            assert found["probability_interval"][i] == pytest.approx(mean_interval(p, (0, 1)))
    assert mean[0, 1] != found["win_rate"][0][1] or found["judge"] == "longer"
    assert found["mean_characters"] == [np.mean([len(text) for text in replies[name]]) for name in names]


def test_a_win_rate_s_new_figures_by_hand():
    replies = {"a": ["xx", "x", "xxxx"], "b": ["x", "xxx", "xx"]}
    p = {("xx", "x"): 0.75, ("x", "xxx"): 0.5, ("xxxx", "xx"): 0.875}

    def judge(prompts, mine, theirs):
        return np.array([1 - p[z, y] for y, z in zip(mine, theirs, strict=True)])  # it is asked for b against a

    found = win_rates(judge, ["1", "2", "3"], replies)
    np.testing.assert_allclose(found.probability[0, 1], [0.75, 0.5, 0.875])
    np.testing.assert_allclose(found.probability[1, 0], [0.25, 0.5, 0.125])
    assert found.mean_probability[0, 1] == pytest.approx(2.125 / 3) and found.rate[0, 1] == pytest.approx(2.5 / 3)
    want = length_controlled_rate(np.array([0.75, 0.5, 0.875]), np.array([2, 1, 4]), np.array([1, 3, 2]))
    assert found.length_controlled[0, 1] == pytest.approx(want, abs=1e-12) and want != 0.5


def test_the_reference_s_log_probs_are_those_of_its_tokens(model, params, other_params, prompt):
    """log mu is summed over real tokens alone, and the log-ratio has the policy above."""
    completion = ragged([[4, 5, 6], [7], [8, 9], [3, 2]], 5)
    score = reply_scorer(log_prob(model), sharding.make_mesh(sharding.Mesh(), jax.devices()[:1]))
    mine, reference = (np.asarray(log_prob(model)(p, prompt, completion)) for p in (params, other_params))
    found = score(other_params, prompt, completion, mine)
    lengths = completion.mask.sum(-1)
    want = [sum(row[:n]) for row, n in zip(reference, lengths, strict=True)]
    np.testing.assert_allclose(found.reference_logp, want, rtol=1e-5)
    np.testing.assert_allclose(found.kl + found.reference_logp, mine.sum(-1), rtol=1e-4)


def test_what_replies_look_like_is_measured_on_equally_many_words(workdir):
    _, replies = texts(workdir)
    found = read(workdir, "win_rates.json")[0]
    words = min(sum(len(text.split()[:20]) for text in texts) for texts in replies.values())
    for n in (1, 2, 3):
        want = [distinct_n(replies[name], n, 20, words) for name in found["policies"]]
        assert found[f"distinct_{n}"] == pytest.approx(want)
    for name, value in zip(found["policies"], found["perplexity"], strict=True):
        columns = read(workdir, f"replies-{name}.json")
        assert value == pytest.approx(np.exp(-np.sum(columns["reference_logp"]) / np.sum(columns["length"])))
    perplexity = dict(zip(found["policies"], found["perplexity"], strict=True))
    assert 1 < perplexity["base"] < perplexity["mine"]  # the reference finds its own text the likeliest


def test_filtered_samples_estimate_no_kl_and_have_a_perplexity(workdir):
    (found, _) = json.loads((workdir / "filtered" / "win_rates.json").read_text())
    assert found["kl_to_reference"] == found["entropy"] == [None] and found["perplexity"][0] > 1
    assert found["baseline"] == "a"  # the reference does not play: the first


def test_the_report_shows_the_new_tables_and_an_older_run_s_are_as_they_were(workdir, tmp_path, capfd):
    found = read(workdir, "win_rates.json")
    text = write_report(workdir, {"table": json.loads((workdir / "table" / "stage.json").read_text())})
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    mean, (low, high) = found[1]["mean_probability"][0][1], found[1]["probability_interval"][0]
    cells = [f"{mean:.3f} [{low:.3f}, {high:.3f}]", f"{found[1]['length_controlled'][0][1]:.3f}"]
    assert ["mine", *cells, f"{found[1]['mean_characters'][0]:.1f}"] in rows
    assert ["base", "-", "-", f"{found[1]['mean_characters'][1]:.1f}"] in rows
    looks = [f"{found[0][f'distinct_{n}'][2]:.3f}" for n in (1, 2, 3)]
    assert ["third", *looks, f"{found[0]['perplexity'][2]:.2f}", f"{found[0]['entropy'][2]:.2f}"] in rows
    assert text.count("## What the replies look like") == 1
    report = (workdir / "report.md").read_text()
    assert all(tables.baseline_table(one) in report for one in found) and tables.replies_table(found[0]) in report
    new = {"baseline", "mean_probability", "probability_interval", "length_controlled", "mean_characters"}
    new |= {"distinct_1", "distinct_2", "distinct_3", "perplexity", "entropy"}
    older = [{name: value for name, value in one.items() if name not in new} for one in found]
    assert [tables.win_rate_table(one) for one in older] == [tables.win_rate_table(one) for one in found]
    (tmp_path / "table").mkdir()
    shutil.copy(workdir / "table" / "samples.json", tmp_path / "table")
    storage.write_json(tmp_path / "table" / "win_rates.json", older)
    shown = write_report(tmp_path, {"table": json.loads((workdir / "table" / "stage.json").read_text())})
    assert shown == "\n".join([*map(tables.win_rate_table, found), f"report: {tmp_path / 'report.md'}"])


def test_a_stage_rates_the_policies_of_each_judge(workdir):
    numbers = json.loads((workdir / "ratings" / "numbers.json").read_text())
    assert [one["title"] for one in numbers] == ["judge: longer", "judge: soft"]
    for one, found in zip(numbers, read(workdir, "win_rates.json"), strict=True):
        assert one["policies"] == found["policies"] and one["bootstrap"]["is_paired"]
        np.testing.assert_allclose(one["win_rate"], found["win_rate"], atol=1e-15)
    assert "## Ratings of the pool, judge: soft" in (workdir / "ratings" / "section.md").read_text()


def outputs(workdir, folder, form):
    assert main(["outputs", str(workdir / "table"), str(folder), "--format", form]) == 0
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_alpaca_eval_s_files_have_its_fields_and_its_win_rate(workdir, tmp_path, capfd):
    prompts, replies = texts(workdir)
    files = outputs(workdir, tmp_path / "out", "alpaca_eval")
    judged = [f"annotations-{judge}/{policy}.json" for judge in ("longer", "soft") for policy in ("mine", "third")]
    assert files == sorted([*judged, *(f"model_outputs/{policy}.json" for policy in POLICIES)])
    for policy in POLICIES:
        rows = json.loads((tmp_path / "out" / "model_outputs" / f"{policy}.json").read_text())
        assert [row["output"] for row in rows] == replies[policy]
        assert all(row.keys() == {"instruction", "output", "generator"} for row in rows)
        assert {row["generator"] for row in rows} == {policy}
    instructions = [row["instruction"] for row in rows]
    assert instructions[:4] == WORDS[:4] and instructions[4:] == prompts[4:]  # dialogues of two turns as they are
    for found in read(workdir, "win_rates.json"):
        for policy in ("mine", "third"):
            rows = json.loads((tmp_path / "out" / f"annotations-{found['judge']}" / f"{policy}.json").read_text())
            assert list(rows[0]) == [
                "instruction", "generator_1", "output_1", "generator_2", "output_2", "annotator", "preference"
            ]  # fmt: skip
            assert [row["output_1"] for row in rows] == replies["base"]
            assert [row["output_2"] for row in rows] == replies[policy]
            names = {(row["generator_1"], row["generator_2"], row["annotator"]) for row in rows}
            assert names == {("base", policy, found["judge"])} and [row["instruction"] for row in rows] == instructions
            preferences = np.array([row["preference"] for row in rows])
            assert np.all((preferences >= 1) & (preferences <= 2))
            mean = found["mean_probability"][found["policies"].index(policy)][1]
            assert np.mean(preferences - 1) == pytest.approx(mean)


def test_arena_hard_s_files_have_its_fields(workdir, tmp_path, capfd):
    _, replies = texts(workdir)
    files = outputs(workdir, tmp_path / "out", "arena_hard")
    assert files == [*(f"model_answer/{policy}.jsonl" for policy in POLICIES), "question.jsonl"]
    questions = lines(tmp_path / "out" / "question.jsonl")
    assert all(row.keys() == {"uid", "category", "prompt"} for row in questions)
    assert len({row["uid"] for row in questions}) == 8
    answers = {policy: lines(tmp_path / "out" / "model_answer" / f"{policy}.jsonl") for policy in POLICIES}
    for policy, rows in answers.items():
        lengths = read(workdir, f"replies-{policy}.json")["length"]
        for question, row, reply, length in zip(questions, rows, replies[policy], lengths, strict=True):
            assert list(row) == ["uid", "ans_id", "model", "messages", "tstamp", "metadata"]
            assert (row["uid"], row["model"]) == (question["uid"], policy) and row["tstamp"] > 1.7e9
            user, assistant = row["messages"]
            assert user == {"role": "user", "content": question["prompt"]}
            assert assistant == {"role": "assistant", "content": {"answer": reply}}
            assert list(row["metadata"]) == ["token_len", "header_count", "list_count", "bold_count"]
            assert row["metadata"]["token_len"] == length
    assert len({row["ans_id"] for rows in answers.values() for row in rows}) == 24


def test_mt_bench_s_files_have_the_turns_of_the_dialogue(workdir, tmp_path, capfd):
    _, replies = texts(workdir)
    outputs(workdir, tmp_path / "out", "mt_bench")
    questions = lines(tmp_path / "out" / "question.jsonl")
    assert [row["turns"] for row in questions[:5]] == [["red"], ["blue"], ["green"], ["one"], ["red", "no"]]
    assert [row["question_id"] for row in questions] == list(range(1, 9))
    for policy in POLICIES:
        rows = lines(tmp_path / "out" / "model_answer" / f"{policy}.jsonl")
        assert all(list(row) == ["question_id", "answer_id", "model_id", "choices", "tstamp"] for row in rows)
        assert [row["choices"] for row in rows] == [
            [{"index": 0, "turns": [*earlier, reply]}]
            for earlier, reply in zip([[]] * 4 + [[word] for word in WORDS[5:9]], replies[policy], strict=True)
        ]
        assert [(row["question_id"], row["model_id"]) for row in rows] == [(i, policy) for i in range(1, 9)]


def test_the_same_tournament_gives_the_same_files(workdir, tmp_path):
    for form in OUTPUT_FORMATS:
        for name in "ab":
            exchange.write_outputs(workdir / "table", tmp_path / form / name, form, 5.0)
        a, b = ({p.name: p.read_bytes() for p in (tmp_path / form / name).rglob("*.json*")} for name in "ab")
        assert a == b != {}
    assert tuple(exchange.FORMATS) == OUTPUT_FORMATS


def test_markdown_is_counted_outside_code():
    text = (
        "# A\n## B\n## C\n#no\n```\n# code\n- code\n**code**\n```\n1. x\n 2. y\n- z\n* w\n+ v\n**b** __c__ **d** ** e\n"
    )
    assert exchange.markdown_counts(text) == {
        "header_count": {"h1": 1, "h2": 2, "h3": 0, "h4": 0, "h5": 0, "h6": 0},
        "list_count": {"ordered": 2, "unordered": 3},
        "bold_count": {"**": 2, "__": 1},
    }


def chat(*roles):
    return {"messages": [{"role": role, "content": role[0] + str(i)} for i, role in enumerate(roles)]}


def test_a_system_message_stands_before_the_first_question():
    asked = exchange.split_turns(chat("system", "user", "assistant", "user"), 1)
    assert asked == (["s0\n\nu1", "u3"], ["a2"])


@pytest.mark.parametrize("row", [
    {"messages": None}, {"messages": []}, chat("assistant"), chat("user", "assistant"), chat("user", "user"),
    chat("system"),
])  # fmt: skip
def test_a_prompt_that_is_no_chat_has_no_turns(row):
    with pytest.raises(UserError, match="prompt 7 of the tournament is no chat of alternating turns"):
        exchange.split_turns(row, 7)


def test_what_cannot_be_written_is_said_in_one_line_and_nothing_is_left(workdir, tmp_path, capfd):
    def answer(stage, form="alpaca_eval"):
        return refused(capfd, "outputs", str(stage), str(tmp_path / "out"), "--format", form)

    assert "base holds no finished tournament; give" in answer(workdir / "base")
    assert "nowhere holds no finished tournament" in answer(tmp_path / "nowhere")
    shutil.copytree(workdir / "table", tmp_path / "old")
    (tmp_path / "old" / "judgments-soft.json").write_text("[]")
    assert "does not compare" in answer(tmp_path / "old") and "is damaged" in answer(tmp_path / "old")
    (tmp_path / "old" / "judgments-soft.json").write_text("{")
    assert "judgments-soft.json is missing or damaged" in answer(tmp_path / "old")
    rows = read(workdir, "outputs.json")
    storage.write_json(tmp_path / "old" / "outputs.json", [rows[0], {**rows[1], "messages": None}])
    (tmp_path / "old" / "judgments-soft.json").write_text("[]")
    assert "prompt 2 of the tournament is no chat" in answer(tmp_path / "old", "mt_bench")
    (tmp_path / "old" / "outputs.json").unlink()
    assert "kept no prompts; remove it" in answer(tmp_path / "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["old"]
    (tmp_path / "out").mkdir()
    assert "out exists; choose another folder" in answer(workdir / "table")
