"""Dialogues as text: contrast prompts, the filter of replies, messages (2307.12950)."""

from __future__ import annotations

from alignjax.errors import UserError

ROLE = "\n\nAssistant"


def contrast_dialogue(prompt: str, last: str, earlier: str) -> str:
    """The prompt with ``last`` after its final role marker and ``earlier`` after every other one.

    2307.12950 section 3 and the released code: the opposite polarity on earlier turns sets the last
    turn apart. The prompt must end in "Assistant:".
    """
    if not prompt.endswith(f"{ROLE}:"):
        raise UserError(f"the prompt {prompt[-40:]!r} does not end in 'Assistant:'; cut it there")
    turns = prompt.removesuffix(f"{ROLE}:").replace(f"{ROLE}:", f"{ROLE} {earlier}:")
    return f"{turns}{ROLE} {last}:"


def clean_reply(raw: str) -> str | None:
    """The reply in a base model's continuation, or None when it must be sampled again.

    2307.12950, released filter: a next human turn must follow; the reply ends at the last newline
    before it; with a stray role marker, only what follows the first is kept; nothing left is a failure.
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
