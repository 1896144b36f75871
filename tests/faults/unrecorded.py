"""Calls that the provider served and nobody recorded: which are explained, and which are named in the database.

trueup can't record an answer that never came, or one whose process died holding it. It can say beforehand that the
call begins: table `trueup.call_intent`. Where that is there, every unrecorded call must have a row of it with a bound
no smaller than what the provider billed (of what it was asked for). Nor may a call stay as begun whose caller lived,
and got its answer: that one was to be charged.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tests.faults.ledger import Serving

Cause = Literal["answer lost", "process killed", "another attempt was recorded", "none"]


@dataclass(frozen=True, kw_only=True)
class Unrecorded:
    """A serving in no charge. `named`: a row in the database tells of it; None: there is no such table.

    `outcome`: what that row says, "started" or "unknown"; None: there is no row.
    """

    serving: Serving
    cause: Cause
    named: bool | None
    outcome: str | None = None

    @property
    def lost(self) -> bool:
        """True when nothing tells of it: without the table, when also no crash and no lost answer explains it."""
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
    """Return the billed servings that no charge names.

    `intents`: rows of the calls that were begun and not recorded; None when there is no such table. `killed`: when
    each process was killed, by pid.
    """
    last_asked: dict[int, float] = {}
    for serving in servings:
        last_asked[serving.pid] = max(serving.started_at, last_asked.get(serving.pid, 0))
    recorded_calls = {(serving.task_id, serving.call) for serving in servings if serving.model_name in recorded}
    missing = [serving for serving in servings if serving.billed and serving.model_name not in recorded]
    named = None if intents is None else _named(missing, intents)
    return [
        Unrecorded(
            serving=serving,
            # A process that asked again had done with this call: its later death is no excuse.
            cause=_cause(serving, recorded_calls, killed if last_asked[serving.pid] == serving.started_at else {}),
            named=None if named is None else serving.serial in named,
            outcome=None if named is None else named.get(serving.serial),
        )
        for serving in missing
    ]


def _cause(serving: Serving, recorded_calls: set[tuple[str, int]], killed: Mapping[int, float]) -> Cause:
    if not serving.answered or serving.behaviour == "timeout":
        return "answer lost"
    if killed.get(serving.pid, 0) > serving.started_at:
        return "process killed"
    if (serving.task_id, serving.call) in recorded_calls:
        return "another attempt was recorded"
    return "none"


def _named(missing: Sequence[Serving], intents: Iterable[Any]) -> dict[int, str]:
    """Return the outcomes of the servings that a row tells of, by their serials; each row tells of one."""
    rows = defaultdict(list)
    for intent in intents:
        rows[intent.user_id, intent.task_id, intent.fingerprint].append(intent)
    named = {}
    # The dearest first, each with the smallest bound that suffices.
    for serving in sorted(missing, key=lambda serving: -min(serving.billed, serving.asked)):
        place = serving.user_id, serving.task_id, serving.fingerprint
        left = sorted(rows[place], key=lambda intent: intent.tokens_bound)
        fitting = [intent for intent in left if intent.tokens_bound >= min(serving.billed, serving.asked)]
        if fitting:
            rows[place].remove(fitting[0])
            named[serving.serial] = fitting[0].outcome
    return named
