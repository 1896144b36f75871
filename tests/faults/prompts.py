"""Prompts that tell the provider which call it serves."""

import re
from dataclasses import dataclass

_PROMPT = re.compile(r"task (\S+?)(?:#(\d+))? call (\d+) user (\d+):")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The caller, as a prompt names it. `request`: its number among the requests that share the task id."""

    task_id: str
    request: int
    call: int
    user_id: int


def label_of(task_id: str, request: int) -> str:
    """Return the name of a request: its task id, with its number if it is not the first with that id."""
    return task_id if request == 1 else f"{task_id}#{request}"


def prompt_of(label: str, call: int, user_id: object, words: int) -> str:
    """Return a prompt for that call of a request, `words` tokens longer than necessary."""
    return f"task {label} call {call} user {user_id}:" + " token" * words


def read_prompt(prompt: str) -> Asked:
    """Return the caller that a prompt names anywhere in its text. Raises ValueError if it names none."""
    found = _PROMPT.search(prompt)
    if found is None:
        raise ValueError(f"no prompt of a round: {prompt!r}")
    return Asked(task_id=found[1], request=int(found[2] or 1), call=int(found[3]), user_id=int(found[4]))
