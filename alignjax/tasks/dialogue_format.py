"""Dialogues as text, "Human: ... Assistant: ...": their format, contrast prompts, the filter of replies, messages."""

from __future__ import annotations

import re
from collections.abc import Sequence

from alignjax.errors import UserError
from alignjax.tasks.task import Format

HUMAN, ASSISTANT = "Human:", "\n\nAssistant"
"""Role markers. The assistant's is without its colon, where an affix goes."""
DIALOGUE_FORMAT = Format(before=" ", end=f"\n\n{HUMAN}", stop=(HUMAN,))


def contrast_dialogue(prompt: str, last: str, earlier: str) -> str:
    """Returns the prompt with ``last`` in its final role marker of the assistant and ``earlier`` in every other one.

    "Assistant:" becomes "Assistant (harmless response):". By 2307.12950 section 3 and its released code, the opposite
    affix on earlier turns sets the last turn apart. Raises UserError when the prompt does not end in "Assistant:".
    """
    if not prompt.endswith(f"{ASSISTANT}:"):
        raise UserError(f"the prompt {prompt[-40:]!r} does not end in 'Assistant:'; cut it there")
    history = prompt.removesuffix(f"{ASSISTANT}:").replace(f"{ASSISTANT}:", f"{ASSISTANT} {earlier}:")
    return f"{history}{ASSISTANT} {last}:"


def clean_reply(raw: str) -> str | None:
    """Returns the reply in a base model's continuation, or None when it must be sampled again.

    The filter of the code released with 2307.12950: a next human turn must follow; the reply ends at the last newline
    before it; after a stray "Assistant:" only what follows the first one is kept; an empty reply is refused.
    """
    if "Human" not in raw:
        return None
    text = raw.split("Human")[0]
    if "\n" not in text:
        return None
    text = text[: text.rindex("\n")].strip()
    if "Assistant:" in text:
        text = text.split("Assistant:", 1)[1].strip()
    return text or None


def dialogue_messages(prompt: str) -> list[dict[str, str]]:
    """Returns a dialogue that ends in an open turn of the assistant as chat messages.

    Text before the first turn is the system's message. An affix in the last role marker is put behind the last
    question; affixes of earlier turns are left out. Raises UserError when the prompt is no such dialogue.
    """
    # pieces: role, affix, text, role, affix, text, ...
    preamble, *pieces = re.split(r"(?:^|\n\n)(Human|Assistant)([^:\n]*):", prompt)
    messages = [{"role": "system", "content": preamble.strip()}] if preamble.strip() else []
    messages += [
        {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
        for role, text in zip(pieces[0::3], pieces[2::3], strict=True)
    ]
    if len(messages) < 2 or messages[-1]["content"] or messages[-1]["role"] != "assistant":
        raise UserError(f"the prompt {prompt[-40:]!r} is no dialogue that ends in 'Assistant:'; cut it there")
    affix = pieces[-2].strip()
    messages = messages[:-1]
    if affix:
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']} {affix}"}
    return messages


def dialogue_prompt(messages: Sequence[tuple[str, str]]) -> str:
    """Returns chat messages (role, content) as a dialogue that ends in an open turn of the assistant.

    It is the inverse of ``dialogue_messages``. Raises UserError when the messages are none of its results, or when the
    last one is not the user's.
    """
    names = {"user": HUMAN, "assistant": f"{ASSISTANT.strip()}:"}
    turns = [f"{names[role]} {content}" if role in names else content for role, content in messages]
    prompt = "\n\n".join([*turns, names["assistant"]])
    read_back = [(message["role"], message["content"]) for message in dialogue_messages(prompt)]
    if read_back != list(messages) or read_back[-1][0] != "user":
        raise UserError("the messages are no dialogue of a user and an assistant; correct them")
    return prompt
