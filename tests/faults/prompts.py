"""Prompts that tell the provider which call it serves."""

import re
from dataclasses import dataclass

_PROMPT = re.compile(r"task (\S+) call (\d+) user (\d+):")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The caller, as a prompt names it."""

    task_id: str
    call: int
    user_id: int


def prompt_of(task_id: str, call: int, user_id: object, words: int) -> str:
    """Return a prompt for that call, `words` tokens longer than necessary."""
    return f"task {task_id} call {call} user {user_id}:" + " token" * words


def read_prompt(prompt: str) -> Asked:
    """Return the caller that a prompt names anywhere in its text. Raises ValueError if it names none."""
    found = _PROMPT.search(prompt)
    if found is None:
        raise ValueError(f"no prompt of a round: {prompt!r}")
    return Asked(task_id=found[1], call=int(found[2]), user_id=int(found[3]))
