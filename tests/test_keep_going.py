"""A stage that fails ends alone with --keep-going: what is skipped, what runs, and how the run ends."""

import dataclasses
import fcntl
import json
from pathlib import Path
from typing import ClassVar

import pytest

import alignjax as aj
from alignjax.cli import main
from alignjax.distributed.hosts import Hosts
from alignjax.errors import RunAgain, UserError
from alignjax.fields import Kind
from alignjax.pipeline.run import run, show_report

ERRORS = {"user": UserError, "again": RunAgain, "bug": ZeroDivisionError, "stop": KeyboardInterrupt}


@dataclasses.dataclass(frozen=True)
class Step:
    """A stage that raises the error that its file in the folder of the run names; ``ran`` notes its name."""

    after: dict[str, str] = aj.stage_input(Kind.FINDINGS, default=None)
    makes: ClassVar = Kind.FINDINGS
    meanings: ClassVar = {}
    ran: ClassVar[list] = []

    def check(self, context):
        pass

    def network(self, context):
        return None

    def exposure(self, context):
        return aj.Exposure()

    def programs(self, context):
        return ()

    def run(self, context, programs):
        self.ran.append(context.name)
        wish = context.folder.parent / f"{context.name}.error"
        if wish.exists():
            raise ERRORS[wish.read_text()](f"{context.name}: it is broken; mend it")
        (context.folder / "section.md").write_text(f"## {context.name}\n")
        return {}


def steps():
    """a -> b -> c; d; a and d -> e."""
    after = lambda *names: Step({name: name for name in names})  # noqa: E731
    return aj.Experiment(None, {"a": Step(), "b": after("a"), "c": after("b"), "d": Step(), "e": after("a", "d")})


def get_config():
    return steps()


def broken(folder, **errors):
    for name, kind in errors.items():
        (folder / f"{name}.error").write_text(kind)
    Step.ran.clear()


def finished(folder):
    return {path.parent.name for path in folder.glob("*/stage.json") if json.loads(path.read_text())["finished"]}


def test_what_needs_the_failed_stage_is_skipped_and_the_rest_runs(tmp_path, capfd):
    broken(tmp_path, b="user")
    with pytest.raises(UserError, match=r"^failed: b; skipped: c; the lines above say why") as error:
        run(steps(), tmp_path, keep_going=True)
    assert Step.ran == ["a", "b", "d", "e"] and finished(tmp_path) == {"a", "d", "e"} and "\n" not in str(error.value)
    out, err = capfd.readouterr()
    assert "b: failed; b: it is broken; mend it\n" in err and "c: skipped, because b is not finished\n" in err
    assert "## d" in out and "## b" not in out


def test_skips_go_down_the_line_and_several_failures_are_all_named(tmp_path):
    broken(tmp_path, a="user", d="user")
    with pytest.raises(UserError, match=r"^failed: a, d; skipped: b, c, e;"):
        run(steps(), tmp_path, keep_going=True)
    assert Step.ran == ["a", "d"] and not (tmp_path / "a").exists()


def test_the_same_command_tries_again_what_failed_and_runs_what_was_skipped(tmp_path, capfd):
    broken(tmp_path, a="user")
    with pytest.raises(UserError):
        run(steps(), tmp_path, keep_going=True)
    (tmp_path / "a.error").unlink()
    Step.ran.clear()
    run(steps(), tmp_path, keep_going=True)
    assert Step.ran == ["a", "b", "c", "e"] and finished(tmp_path) == set("abcde")
    assert "report.md" in capfd.readouterr().out


def test_without_it_the_first_failure_ends_the_run(tmp_path):
    broken(tmp_path, b="user")
    with pytest.raises(UserError, match=r"^b: it is broken"):
        run(steps(), tmp_path)
    assert Step.ran == ["a", "b"]


@pytest.mark.parametrize("kind", ["again", "bug", "stop"])
def test_other_errors_end_the_run_all_the_same(tmp_path, kind):
    broken(tmp_path, b=kind)
    with pytest.raises(ERRORS[kind]):
        run(steps(), tmp_path, keep_going=True)
    assert Step.ran == ["a", "b"]


def test_what_is_known_to_fail_is_refused_before_anything_runs(tmp_path, monkeypatch):
    def check(self, context):
        if context.name == "d":
            raise UserError("d: a wrong number; correct it")

    monkeypatch.setattr(Step, "check", check)
    broken(tmp_path)
    with pytest.raises(UserError, match=r"^d: a wrong number"):
        run(steps(), tmp_path, keep_going=True)
    assert Step.ran == []


def test_a_stage_at_work_elsewhere_counts_as_failed(tmp_path, capfd):
    broken(tmp_path)
    with (tmp_path / ".b.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"^failed: b; skipped: c;"):
            run(steps(), tmp_path, keep_going=True)
    assert finished(tmp_path) == {"a", "d", "e"} and "at work in another process" in capfd.readouterr().err


@pytest.mark.parametrize("together", [True, False])
def test_of_several_processes_all_go_on_or_all_end(tmp_path, monkeypatch, together):
    """An error that the others do not raise ends the run with its own line, as without --keep-going."""
    met = []
    monkeypatch.setattr(Hosts, "all_meet", lambda self, where, seconds: met.append(where) or together)
    broken(tmp_path, b="user")
    with pytest.raises(UserError, match=r"^failed: b; skipped: c" if together else r"^b: it is broken; mend it$"):
        run(steps(), tmp_path, keep_going=True)
    assert Step.ran == (["a", "b", "d", "e"] if together else ["a", "b"]) and met == ["the failure of b"]


def test_the_command_ends_with_status_2_and_its_last_line_lists_what_failed(tmp_path, capfd):
    broken(tmp_path, b="user")
    argv = [__file__, "--workdir", str(tmp_path)]
    assert main(["run", *argv, "--keep-going"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[-1].startswith("alignjax: failed: b; skipped: c;") and finished(tmp_path) == {"a", "d", "e"}
    assert main(["table", *argv]) == 2 and "'b' in" in capfd.readouterr().err
    assert main(["table", *argv, "--keep-going"]) == 0 and "## d" in capfd.readouterr().out
    assert "## e" in (tmp_path / "report.md").read_text()
    (tmp_path / "b.error").unlink()
    assert main(["run", *argv, "--keep-going"]) == 0


def test_a_report_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no stage is finished in"):
        show_report(steps(), Path(tmp_path), keep_going=True)
