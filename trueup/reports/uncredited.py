"""Packs that a user has paid for and that are in neither plan, grant nor counter. No drift shows them."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection

from trueup.accounts.user_ids import UserId, plain_id
from trueup.host.mapping import HostMapping
from trueup.host.sql import INSTALLED, OwnTables, render_statement

MAX_PACKS = 1_000
"""The packs that a report lists."""


@dataclass(frozen=True, kw_only=True)
class UncreditedPack:
    """A pack that was paid for and not credited. `reference`: of the payment, as a grant for it would have it.

    `certainty`: proven by the journal, or inferred from counter, plan and usage.
    """

    user_id: UserId
    payment_id: str
    reference: str
    tokens: int
    paid_at: datetime
    certainty: str

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "user_id": plain_id(self.user_id), "paid_at": self.paid_at.isoformat()}


@dataclass(frozen=True, kw_only=True)
class UncreditedPacks:
    """All such packs: their number and tokens, and the newest ones, at most `MAX_PACKS`."""

    packs: int
    tokens: int
    newest: list[UncreditedPack]

    def as_json(self) -> dict[str, Any]:
        return {"packs": self.packs, "tokens": self.tokens, "newest": [pack.as_json() for pack in self.newest]}


def uncredited_packs(
    connection: Connection,
    mapping: HostMapping,
    *,
    at: datetime,
    only_user: UserId | None = None,
    own: OwnTables = INSTALLED,
) -> UncreditedPacks | None:
    """Return the packs that were paid for in the present windows until an hour before `at`, and never credited.

    `only_user` None: of all users. `own`: trueup's tables, or their substitutes.
    Returns None if the host's payments are not mapped, or if the subscription itself states the tokens that it
    includes, because a pack may be among them.
    """
    if mapping.payment.table is None or mapping.subscription.tokens_included is not None:
        return None
    values: dict[str, Any] = {"at": at, "most": MAX_PACKS} | ({} if only_user is None else {"only_user": only_user})
    statement = render_statement(_PACKS, mapping, own, condition=_condition(only_user))
    rows = connection.execute(statement, values).mappings().all()
    names = UncreditedPack.__dataclass_fields__
    return UncreditedPacks(
        packs=rows[0]["packs"] if rows else 0,
        tokens=rows[0]["all_tokens"] if rows else 0,
        newest=[UncreditedPack(**{name: row[name] for name in names}) for row in rows],
    )


def _condition(only_user: UserId | None) -> Callable[[str], str]:
    return lambda column: "" if only_user is None else f" AND {column} = :only_user"


_PACKS = '{% from "reports/uncredited.sql" import uncredited_packs %}{{ uncredited_packs(condition) }}'
REMEDY = "Credit them with `trueup tokens import-payments`, or refund them."
