"""The words of the RLCD authors (2307.12950) as prompt material, read from their released scripts.

The scripts lie in github.com/facebookresearch/RLCD under scripts/. They are parsed and never run, and their words do
not stand in this package.
"""

from __future__ import annotations

import ast
from typing import Any

from alignjax.errors import UserError
from alignjax.tasks.json_lines import read_text_file
from alignjax.tasks.prompt_material import PromptMaterial
from alignjax.tasks.task import Template

_EVALUATIONS = {"harmless": {"harmless": "harmless", "helpful": "harmless_helpful"}, "helpful": {"helpful": "helpful"}}
"""Attribute -> quality -> its name in gpt4_compare.py."""


def convert_rlcd_material(simulate: str, attribute: str, compare: str = "") -> PromptMaterial:
    """Returns the authors' affixes and rater questions for "harmless" or "helpful", word for word.

    ``simulate`` is the path of simulate_preference_data.py, ``compare`` that of gpt4_compare.py, whose questions become
    ``evaluation_questions``. A question of ``compare`` gets an open bracket behind it, where a judge answers with one
    token. Of what surrounds the questions, only what the scripts do to the texts is not carried over: they drop blank
    lines inside dialogues and replies, and the last "Assistant:" of the prompt.

    Raises UserError when the attribute is another, and when a file has another layout.
    """
    if attribute not in _EVALUATIONS:
        raise UserError(f"attribute={attribute!r} is unknown; choose one of {', '.join(_EVALUATIONS)}")
    tree = _parse(simulate)
    try:
        lists = _text_lists(tree)
        kinds = ("POSITIVE_AFFIXES", "NEGATIVE_AFFIXES", "ANTHROPIC_INSTRUCTIONS")
        names = [f"{attribute.upper()}_{kind}" for kind in kinds]
        if missing := [name for name in names if not lists.get(name)]:
            raise ValueError(f"has no list of texts {missing[0]}")
        positive, negative, instructions = (lists[name] for name in names)
        if not len(positive) == len(negative) == len(instructions):
            raise ValueError(f"has lists of different lengths for {attribute!r}")
        questions = tuple(_label_question(_label_prompt(tree), text.strip()) for text in instructions)
    except ValueError as error:
        raise UserError(f"{simulate} {error}; give the released simulate_preference_data.py") from None
    evaluation = _evaluation_questions(compare, attribute) if compare else {}
    return PromptMaterial(tuple(zip(positive, negative, strict=True)), questions, evaluation)


def _parse(path: str) -> ast.Module:
    """Returns the syntax tree of a Python file. Raises UserError when it is none."""
    text = read_text_file(path, "a Python file")
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError(f"{path} is no Python file; give the script as it was released") from None


def _text_lists(tree: ast.Module) -> dict[str, list[str]]:
    """Returns name -> texts of the lists of literals that the file defines."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.List):
            texts = [part.value for part in node.value.elts if isinstance(part, ast.Constant)]
            if len(texts) == len(node.value.elts) and all(isinstance(text, str) for text in texts):
                found[node.targets[0].id] = [text for text in texts if isinstance(text, str)]
    return found


def _label_prompt(tree: ast.Module) -> list[str]:
    """Returns the literal pieces of what the script appends to ``label_prompts``: around its four values."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "label_prompts.append":
            return _around(node.args[0], ("prompt", "instruction", "resultA", "resultB"))
    raise ValueError("appends nothing to label_prompts")


def _label_question(pieces: list[str], instruction: str) -> Template:
    """Returns the rater's question with an instruction in its place."""
    preamble, after_prompt, before, between, question = pieces
    return Template(
        before=_without_space(f"{after_prompt}{instruction}{before}"),
        between=_without_space(between),
        question=question,
        answer="A",
        other="B",
        preamble=preamble,
    )


def _evaluation_questions(path: str, attribute: str) -> dict[str, Template]:
    """Returns quality -> question of the script that compares policies. Raises UserError on another layout."""
    tree = _parse(path)
    try:
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == "format_prompt"]
        if not functions:
            raise ValueError("has no function format_prompt")
        preamble = next((_sum(v)[0] for name, v in _assigned(functions[0].body) if name == "prompt"), None)
        if not isinstance(preamble, str):
            raise ValueError("has no text before the prompt in format_prompt")
        branches = {
            node.test.comparators[0].value: node.body
            for node in ast.walk(functions[0])
            if isinstance(node, ast.If) and isinstance(node.test, ast.Compare)
            and isinstance(node.test.comparators[0], ast.Constant)
        }  # fmt: skip
        named = _EVALUATIONS[attribute]
        if missing := [name for name in named.values() if name not in branches]:
            raise ValueError(f"asks no question for the task {missing[0]!r}")
        return {quality: _evaluation_question(preamble, branches[name]) for quality, name in named.items()}
    except ValueError as error:
        raise UserError(f"{path} {error}; give the released gpt4_compare.py") from None


def _evaluation_question(preamble: str, body: list[ast.stmt]) -> Template:
    """Returns the question that one branch of format_prompt makes: the two outputs, and then what is asked of them."""
    assigned = list(_assigned(body))
    leads = {name: _around(value, (name,))[0] for name, value in assigned if name in ("output1", "output2")}
    added = [value for name, value in assigned if name == "prompt"]
    if len(leads) != 2 or len(added) != 2:
        raise ValueError("builds its question in another way")
    before, between, _ = _around(added[0], ("output1", "output2"))
    (question,) = _around(added[1], ())
    return Template(
        before=_without_space(before + leads["output1"]),
        between=_without_space(between + leads["output2"]),
        question=f"{question}\n\n(",
        answer="A",
        other="B",
        preamble=preamble,
    )


def _assigned(body: list[ast.stmt]) -> list[tuple[str, ast.expr]]:
    """Returns (name, value) of the statements ``name = value`` and ``name += value``, in order."""
    found = []
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AugAssign) and isinstance(target, ast.Name):
            found.append((target.id, node.value))
    return found


def _sum(node: ast.expr) -> list[Any]:
    """Returns the terms of a sum: literals as texts, adjacent ones joined, and other expressions as they are."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _sum(node.left), _sum(node.right)
        if isinstance(left[-1], str) and isinstance(right[0], str):
            return [*left[:-1], left[-1] + right[0], *right[1:]]
        return [*left, *right]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else [node]


def _around(node: ast.expr, names: tuple[str, ...]) -> list[str]:
    """Returns the texts before, between and after the values of a sum, which mention ``names`` in this order."""
    texts, values = [""], []
    for term in _sum(node):
        if isinstance(term, str):
            texts[-1] += term
        else:
            values.append(_mentioned(term))
            texts.append("")
    if len(values) != len(names) or not all(map(lambda name, found: name in found, names, values)):
        raise ValueError(f"puts other values than {', '.join(names) or 'a text'} into a question")
    return texts


def _mentioned(node: ast.expr) -> set[Any]:
    """Returns the names and the literals that an expression mentions."""
    parts = list(ast.walk(node))
    return {n.id for n in parts if isinstance(n, ast.Name)} | {n.value for n in parts if isinstance(n, ast.Constant)}


def _without_space(text: str) -> str:
    """Returns a text without the space at its end, which a reply brings with it."""
    if not text.endswith(" "):
        raise ValueError("puts a reply behind another mark than a space")
    return text[:-1]
