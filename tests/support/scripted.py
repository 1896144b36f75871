"""Models that answer as a test says, and record their prompts."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trueup.errors import HoldExhaustedError
from trueup.features.instagram.effects import Outbox, Outcome
from trueup.llm.model import Completion, Message
from trueup.llm.offline.server import OfflineServer
from trueup.llm.tokens import count_prompt_tokens, offline_counter


def completion(text: str, *, truncated: bool = False) -> Completion:
    return Completion(
        text=text,
        prompt_tokens=10,
        completion_tokens=5,
        total_tokens=15,
        model_name="scripted",
        response_time_ms=1,
        truncated=truncated,
    )


class ScriptedModel:
    """Gives the answers in turn. After the last one its hold is exhausted."""

    def __init__(self, *answers: str | Completion) -> None:
        self._answers = list(answers)
        self.prompts: list[Sequence[Message]] = []
        self.caps: list[int | None] = []

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        self.prompts.append(messages)
        self.caps.append(max_completion_tokens)
        if not self._answers:
            raise HoldExhaustedError("0 tokens are left of the hold")
        answer = self._answers.pop(0)
        return completion(answer) if isinstance(answer, str) else answer


class HeldModel:
    """The offline server behind a hold of a given size, capped and refused like a metered model. No database."""

    def __init__(self, tokens: int) -> None:
        self._server = OfflineServer()
        self.tokens_left = tokens
        self.completions: list[Completion] = []

    def complete(self, messages: Sequence[Message], *, max_completion_tokens: int | None = None) -> Completion:
        prompt = count_prompt_tokens(messages, offline_counter())
        affordable = self.tokens_left - prompt
        if affordable < 1:
            raise HoldExhaustedError(f"{self.tokens_left} tokens are left of the hold")
        cap = affordable if max_completion_tokens is None else min(affordable, max_completion_tokens)
        text, truncated = self._server.answer(messages, cap)
        made = offline_counter().count(text)
        done = replace(
            completion(text, truncated=truncated),
            prompt_tokens=prompt,
            completion_tokens=made,
            total_tokens=prompt + made,
        )
        self.tokens_left -= done.total_tokens
        self.completions.append(done)
        return done


class AtOnce(Outbox):
    """An outbox without a record: it performs each effect at once."""

    def __init__(self) -> None:
        super().__init__(user_id=1, task_id="scripted", resend_unknown=False)

    def find(self, effect: str) -> Outcome | None:
        return None

    def once(self, effect: str, detail: dict[str, Any], action: Callable[[], dict[str, Any]]) -> Outcome:
        return Outcome(status="sent", detail={**detail, **action()})
