"""Calls that the provider served and that have no charge: which are explained, and which the database names.

trueup can't record an answer that never came, or whose process died with it. It can record beforehand that the call
begins, in the table `trueup.call_intent`. If the table exists, every unrecorded call must have a row with a maximum
cost no smaller than the provider's bill (up to the request). The intent of a call whose caller lived and got its answer
must not stay open, because that call should have been charged.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.faults.ledger import Serving

Cause = Literal["answer lost", "process killed", "another attempt was recorded", "none"]


@dataclass(frozen=True, kw_only=True)
class Unrecorded:
    """A serving without a charge. `named`: a row in the database names it; None: there is no such table.

    `outcome`: that row's outcome, "started" or "unknown"; None: there is no row.
    """

    serving: Serving
    cause: Cause
    named: bool | None
    outcome: str | None = None

    @property
    def lost(self) -> bool:
        """Whether nothing explains it: no row and, without the table, neither a crash nor a lost answer."""
        if self.named is None:
            return self.cause not in ("answer lost", "process killed")
        return not self.named or (self.cause == "none" and self.outcome == "started")

    def __str__(self) -> str:
        serving = self.serving
        named = {None: "", True: f", named as {self.outcome}", False: ", not named"}[self.named]
        return (
            f"{serving.task_id} call {serving.call}, serving {serving.serial} ({serving.behaviour}) by process "
            f"{serving.pid} for user {serving.user_id}: {serving.billed} tokens billed, unrecorded: {self.cause}{named}"
        )


def find_unrecorded(
    servings: Sequence[Serving],
    recorded: set[str],
    intents: Iterable[Any] | None,
    killed: Mapping[int, float],
) -> list[Unrecorded]:
    """Return the billed servings without a charge.

    `intents`: rows of the begun and unrecorded calls; None: there is no such table. `killed`: by pid, the time at
    which each process was killed.
    """
    recorded_calls = {(serving.label, serving.call) for serving in servings if serving.model_name in recorded}
    missing = [serving for serving in servings if serving.billed and serving.model_name not in recorded]
    named = None if intents is None else _named(missing, intents)
    return [
        Unrecorded(
            serving=serving,
            cause=_cause(serving, recorded_calls, {} if _had_finished(serving, servings) else killed),
            named=None if named is None else serving.serial in named,
            outcome=None if named is None else named.get(serving.serial),
        )
        for serving in missing
    ]


def _had_finished(serving: Serving, servings: Sequence[Serving]) -> bool:
    """Return whether its process went on after this call, so that the later death of the process explains nothing.

    A lane of a body makes a call when its call before is finished, and a process runs a body when all lanes of the
    body before have ended. A call in another lane of the same run proves nothing.
    """
    return any(
        other.pid == serving.pid
        and other.started_at > serving.started_at
        and (other.run != serving.run or other.lane == serving.lane)
        for other in servings
    )


def _cause(serving: Serving, recorded_calls: set[tuple[str, int]], killed: Mapping[int, float]) -> Cause:
    if not serving.answered or serving.behaviour == "timeout":
        return "answer lost"
    if killed.get(serving.pid, 0) > serving.started_at:
        return "process killed"
    if (serving.label, serving.call) in recorded_calls:
        return "another attempt was recorded"
    return "none"


def _named(missing: Sequence[Serving], intents: Iterable[Any]) -> dict[int, str]:
    """Return the outcomes of the servings that have a row, by their serials. Each row names one serving."""
    rows = defaultdict(list)
    for intent in intents:
        rows[intent.user_id, intent.task_id, intent.fingerprint].append(intent)
    named = {}
    # The most expensive first, each with the smallest sufficient bound.
    for serving in sorted(missing, key=lambda serving: -min(serving.billed, serving.asked)):
        place = serving.user_id, serving.task_id, serving.fingerprint
        left = sorted(rows[place], key=lambda intent: intent.tokens_bound)
        fitting = [intent for intent in left if intent.tokens_bound >= min(serving.billed, serving.asked)]
        if fitting:
            rows[place].remove(fitting[0])
            named[serving.serial] = fitting[0].outcome
    return named
