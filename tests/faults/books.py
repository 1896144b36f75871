"""The database's content after a round, beside the ledgers of the provider and of Instagram."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import text

from tests.faults.injections import past_every_hold
from tests.faults.ledger import Posting, Serving
from tests.faults.unrecorded import Unrecorded, find_unrecorded
from trueup.gate.holds import expire_holds
from trueup.gate.owed_charges import settle_owed_charges

if TYPE_CHECKING:
    from tests.faults.stages import Stage


@dataclass(frozen=True, kw_only=True)
class Books:
    """Rows and ledgers.

    `tasks_completed`: tasks whose work is done. `tasks_waited`: tasks with a waiting duplicate, so that other
    copies of their message were dropped. `named`: the table of call intents exists. `effects`: the outbox, with the
    text of each effect.
    """

    charges: list[Any]
    holds: list[Any]
    tasks_admitted: set[str]
    tasks_completed: set[str]
    tasks_waited: set[str]
    servings: list[Serving]
    unrecorded: list[Unrecorded]
    named: bool
    effects: list[Any]
    postings: list[Posting]
    expired: int
    late: int

    @property
    def tasks_begun(self) -> set[str]:
        """Return the tasks that have left a row. A task in mode STATIC needs no hold, but has a row in the outbox."""
        return self.tasks_admitted | {effect.task_id for effect in self.effects}


_CHARGES = """
    SELECT c.user_id, c.task_id, c.call_key, split_part(c.call_key, ':', -2) AS fingerprint, c.model_name,
           c.tokens_total, c.tokens_covered, c.late, l.user_id AS log_user, l.total_tokens AS log_tokens,
           (l.metadata ->> 'usage_reported')::boolean AS usage_reported
    FROM trueup.charge c LEFT JOIN ai_usage_log l ON l.id::text = c.log_id
"""
_HOLDS = """
    SELECT id, user_id, task_id, request, attempt, status, completed, coalesce(body_ended_at, closed_at) AS ended_at
    FROM trueup.hold ORDER BY id
"""
_INTENTS = """
    SELECT user_id, task_id, split_part(call_key, ':', -2) AS fingerprint, attempt, tokens_bound, outcome
    FROM trueup.call_intent
"""
_EFFECTS = """
    SELECT user_id, task_id, effect, status, coalesce(detail ->> 'message', detail ->> 'text') AS text
    FROM trueup.outbox
"""


def read_books(stage: "Stage") -> Books:
    """Expire the holds of dead tasks, as the sweep does when their leases have ended, and read everything."""
    with stage.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while expire_holds(connection, now=past_every_hold())[0] > 0:
            pass
        # As the sweep does too: a row that a cut session or a lock refused is written now.
        settle_owed_charges(connection)
        charges = list(connection.execute(text(_CHARGES)))
        holds = list(connection.execute(text(_HOLDS)))
        servings = stage.provider.ledger.servings()
        named = bool(connection.scalar(text("SELECT to_regclass('trueup.call_intent') IS NOT NULL")))
        intents = list(connection.execute(text(_INTENTS))) if named else None
        return Books(
            charges=charges,
            holds=holds,
            tasks_admitted=set(connection.scalars(text("SELECT DISTINCT task_id FROM trueup.hold"))),
            tasks_completed=set(connection.scalars(text("SELECT task_id FROM trueup.hold WHERE completed"))),
            tasks_waited=set(connection.scalars(text("SELECT task_id FROM trueup.hold WHERE duplicate_waits > 0"))),
            servings=servings,
            unrecorded=find_unrecorded(servings, {charge.model_name for charge in charges}, intents, stage.killed),
            named=named,
            effects=list(connection.execute(text(_EFFECTS))),
            postings=stage.graph.ledger.postings(),
            expired=sum(hold.status == "expired" for hold in holds),
            late=sum(charge.late for charge in charges),
        )
