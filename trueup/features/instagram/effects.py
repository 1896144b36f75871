"""Side effects that must not happen twice. Each is recorded in the outbox before it is attempted."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trueup.accounts.user_ids import UserId
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.errors import TrueupError
from trueup.usage.outbox import Effect, EffectStatus, begin_effect, find_effect, finish_effect, reopen_effect


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A side effect's state. `detail`: the request and the answer. "unknown": it may have happened, ask a person."""

    status: EffectStatus
    detail: dict[str, Any]


class Outbox:
    """The outbox of one task in the database. It performs each named side effect at most once.

    `resend_unknown` True: repeat an effect whose outcome is unknown.
    """

    def __init__(self, *, user_id: UserId, task_id: str, resend_unknown: bool) -> None:
        self._user_id = user_id
        self._task_id = task_id
        self._resend_unknown = resend_unknown

    def find(self, effect: str) -> Outcome | None:
        """Return the state in which an earlier attempt left the effect; None if it was never attempted."""
        found = retrying(
            lambda connection: find_effect(connection, user_id=self._user_id, task_id=self._task_id, effect=effect)
        )
        return Outcome(status=found.status, detail=found.detail) if found else None

    def once(self, effect: str, detail: dict[str, Any], action: Callable[[], dict[str, Any]]) -> Outcome:
        """Call `action`, unless an earlier attempt did or may have done so. Its result is added to `detail`.

        Raises the errors of `action`, after recording whether it certainly failed or its outcome is unknown.
        """
        # Not retried, because a second try would find the first one's row and report an effect as unknown that has not
        # begun. It has a connection of its own.
        with connect() as connection:
            begun = begin_effect(connection, user_id=self._user_id, task_id=self._task_id, effect=effect, detail=detail)
            if begun.status == "unknown" and self._resend_unknown:
                begun = reopen_effect(connection, begun)
        if begun.status != "sending":
            return Outcome(status=begun.status, detail=begun.detail)
        try:
            answer = action()
        except TrueupError as error:
            unknown = bool(getattr(error, "outcome_unknown", False))
            self._finish(begun, "unknown" if unknown else "failed", {"error": str(error)})
            raise
        except BaseException as error:
            # For example a time limit, which may interrupt the call at any point, so its outcome is unknown.
            self._finish(begun, "unknown", {"error": type(error).__name__})
            raise
        self._finish(begun, "sent", answer)
        return Outcome(status="sent", detail={**begun.detail, **answer})

    def _finish(self, effect: Effect, status: EffectStatus, detail: dict[str, Any]) -> None:
        retrying(lambda connection: finish_effect(connection, effect, status, detail=detail))
