"""The notebooks run from the first cell to the last, and the part that a user writes is short.

test_quickstart.py runs the notebook that trains, over stages that it has made."""

from pathlib import Path

import nbclient
import nbformat
import pytest

from alignjax.pipeline.config import load, load_module
from alignjax.pipeline.description import describe

ROOT = Path(__file__).parents[1]
GAMES = ROOT / "notebooks" / "games.ipynb"
NOTEBOOK = ROOT / "notebooks" / "new_objective.ipynb"


def own_cells(notebook):
    """Returns the cells that a user writes: the idea and the picture."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"][1:3]


@pytest.mark.parametrize("path", [GAMES, NOTEBOOK], ids=lambda path: path.stem)
def test_a_notebook_imports_the_package_as_aj_alone(path):
    code = "".join(cell.source + "\n" for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    lines = [line.strip() for line in code.splitlines() if "import" in line.split()]
    assert [line for line in lines if "alignjax" in line] == ["import alignjax as aj"]


def test_a_users_own_part_is_at_most_fifteen_lines():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    lines = [line for cell in own_cells(notebook) for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 15
    assert not any(cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"


def test_the_experiment_file_holds_the_notebooks_function():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    function = own_cells(notebook)[0].source.split("\n\n\n")[0].splitlines()
    module = (ROOT / "experiments" / "log_odds.py").read_text()
    assert "\n".join(function) in module
    experiment = load(ROOT / "experiments" / "log_odds.py", {"log_odds.objective.loss.tau": "0.05"})
    assert experiment.stages["log_odds"].objective.loss.keywords == {"tau": 0.05}
    quickstart = load_module(ROOT / "experiments" / "quickstart.py").get_config()
    assert describe(experiment.stages["nash_md"]) == describe(quickstart.stages["nash_md"])


def test_the_games_notebook_shows_a_new_dynamic_against_the_others(monkeypatch, environment):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(GAMES, as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(GAMES.parent)}}).execute()
    _, idea, others, noisy = (cell for cell in notebook.cells if cell.cell_type == "code")
    assert len([line for line in idea.source.splitlines() if line.strip()]) <= 10
    rows = [
        line.split("|") for line in "".join(o.get("text", "") for o in others.outputs).splitlines() if "mine" in line
    ]
    assert len(rows) == 2 and all(float(row[3]) < 1e-12 for row in rows)  # KL: linear, as the idea promised
    for cell in (others, noisy):
        assert any("image/png" in output.get("data", {}) for output in cell.outputs)
    assert not any(cell.get("outputs") for cell in nbformat.read(GAMES, as_version=4).cells)
