"""The pages of docs/ and the README's own examples run; the costs they state are those of their code."""

import ast
import importlib
import linecache
import re
import sys
import types
from typing import NamedTuple

import pytest

from alignjax.checkpoints.families import FAMILIES
from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs" / "extending").glob("*.md"))
FORMAT_PAGES = sorted((ROOT / "docs").glob("*.md"))  # of formats, without a cost


class Block(NamedTuple):
    """A ```python block of a page."""

    line: int  # of the page, from 1, where the code begins
    code: str

    @property
    def file(self):
        """The file that the block stands for, named in its first line; None for a block that only uses it."""
        named = re.match(r"# file: (\S+)", self.code)
        return named and named[1]


def blocks(page):
    text = page.read_text()
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def cost(page):
    """(files, lines) of the blocks that stand for a file; blank lines and comments do not count."""
    named = [block for block in blocks(page) if block.file]
    lines = [line for block in named for line in block.code.splitlines() if line.strip() and line.strip()[0] != "#"]
    return len({block.file for block in named}), len(lines)


def words(files, lines):
    return f"{files} file{'s' * (files > 1)}, {lines} lines"


def run(page, monkeypatch):
    """Runs the page's blocks in order in one module, whose source is the page itself."""
    module = types.ModuleType(f"page_{page.stem}")
    module.__file__ = str(page)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(linecache, "cache", dict(linecache.cache))
    for block in blocks(page):
        exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), module.__dict__)


@pytest.mark.parametrize("page", [*PAGES, *FORMAT_PAGES, README], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_in_order(page, monkeypatch):
    families = dict(FAMILIES)
    try:
        run(page, monkeypatch)
    finally:
        FAMILIES.clear()
        FAMILIES.update(families)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_states_the_cost_of_its_own_code_and_ends_in_what_holds(page):
    stated = re.search(r"^\*\*Cost: (.*?)\*\*", page.read_text(), re.MULTILINE)
    assert stated and stated[1].rstrip(".") == words(*cost(page))
    assert "assert " in blocks(page)[-1].code


def test_the_readme_has_every_page_with_its_cost():
    rows = re.findall(r"\| \[[^]]*\]\(docs/extending/(\w+)\.md\) +\| (\d+ files?, \d+ lines)\b", README.read_text())
    assert dict(rows) == {page.stem: words(*cost(page)) for page in PAGES}


@pytest.mark.parametrize("page", [*PAGES, *FORMAT_PAGES, README], ids=lambda page: page.stem)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text())
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_the_path_from_a_prompt_to_the_table_names_at_most_eight_functions():
    section = re.search(r"## From a prompt to the table\n(.*?)\n## ", README.read_text(), re.DOTALL)[1]
    steps = re.findall(r"^(\d)\. `([\w/]+)\.py`: `([\w.]+)`", section, re.MULTILINE)
    assert [int(number) for number, *_ in steps] == list(range(1, len(steps) + 1)) and 5 <= len(steps) <= 8
    for _, module, name in steps:
        found = importlib.import_module(f"alignjax.{module.replace('/', '.')}")
        for part in name.split("."):
            found = getattr(found, part)
        assert callable(found), name


def test_the_readme_says_where_each_equation_stands():
    rows = re.findall(r"^\| (Eq\. [\d-]+|App\. F\.\d)[^|]*\| `([\w/]+)\.py`: `(\w+)`", README.read_text(), re.MULTILINE)
    assert {equation for equation, *_ in rows} >= {"Eq. 13-14", "Eq. 15", "App. F.1"}
    for equation, module, name in rows:
        source = getattr(importlib.import_module(f"alignjax.{module.replace('/', '.')}"), name).__doc__
        assert equation.removeprefix("Eq. ") in source, f"{module}.{name} does not name {equation}"


def readme_map():
    """The code block of the README's map."""
    return re.search(r"## The map\n.*?```\n(.*?)```", README.read_text(), re.DOTALL)[1]


def rooms_of_the_map():
    """The rooms ("models", "pipeline/stages") and single files ("types") of the map, in its order."""
    return [name for name, _ in re.findall(r"^  ([\w/]+?)(/|\.py) ", readme_map(), re.MULTILINE)]


def test_the_map_names_every_file_and_no_other():
    package = ROOT / "alignjax"
    rooms = {str(path.parent.relative_to(package)) for path in package.rglob("*/__init__.py")} - {"."}
    files = {path.stem for path in package.glob("*.py") if not path.name.startswith("__")}
    assert sorted(rooms_of_the_map()) == sorted(rooms | files)
    listed = re.findall(r"^  ([\w/]+)/ .*\n((?:      .*\n)*)", readme_map(), re.MULTILINE)
    assert {room for room, _ in listed} == rooms
    for room, lines in listed:
        names = [name for line in lines.splitlines() for name in re.findall(r"(\w+)\.py", line)]
        assert sorted(names) == sorted(path.stem for path in (package / room).glob("*.py") if path.stem != "__init__")


def room_of(path):
    """The room or single file of the map that a path of the package ("models/lora") belongs to."""
    return next((room for room in sorted(rooms_of_the_map(), reverse=True) if f"{path}/".startswith(f"{room}/")), None)


def test_a_room_imports_only_from_rooms_above_it_in_the_map():
    package, rooms = ROOT / "alignjax", rooms_of_the_map()
    for file in package.rglob("*.py"):
        own = room_of(file.relative_to(package).with_suffix("").as_posix())
        for node in ast.parse(file.read_text()).body:  # the top of the file: ``run`` imports the report when it has run
            if own and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alignjax"):
                for alias in node.names:
                    used = room_of(f"{node.module}.{alias.name}".replace(".", "/").removeprefix("alignjax/"))
                    assert used is None or rooms.index(used) <= rooms.index(own), f"{file} imports {used}"


def test_pages_name_no_folder_of_a_machine():
    for page in [*PAGES, *FORMAT_PAGES, README]:
        assert not re.search(r"(?<![\w.:/])/(tmp|home|root|work)\b", page.read_text()), page


def test_every_public_name_that_the_readme_uses_exists():
    import alignjax
    from alignjax import losses

    text = README.read_text()
    for room, name in set(re.findall(r"`(aj|losses)\.(\w+)", text)):
        assert hasattr({"aj": alignjax, "losses": losses}[room], name), f"{room}.{name}"
    samplers = re.search(r"## Who writes the responses\n(.*?)\n## ", text, re.DOTALL)[1]
    for name in {name for row in re.findall(r"^\| `\((.*?)\)`", samplers, re.MULTILINE) for name in row.split(", ")}:
        assert hasattr(alignjax, name.split("(")[0]), name
