"""Token packs that the host's payments tell of, given as grants: once per payment."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, text

from trueup.accounts.grants import check_text
from trueup.accounts.user_ids import UserId
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping


class PaymentsNotMappedError(TrueupError):
    """The host's payments are not known to trueup. Nothing was granted."""


@dataclass(frozen=True, kw_only=True)
class PackPayment:
    """A payment for a token pack. `outcome`: to_grant (a dry run), granted, already, or why not: other_figures, revoked
    (its reference has granted something else, or was taken back), same_reference (an earlier payment has it: recorded
    twice, or another pack, which a person can grant), no_subscription (it went meanwhile).

    `grant_id` None: there is no grant of it.
    """

    user_id: UserId
    reference: str
    tokens: int
    paid_at: datetime
    outcome: str
    grant_id: int | None


def import_payments(
    connection: Connection,
    mapping: HostMapping,
    *,
    by: str,
    since: datetime | None = None,
    dry_run: bool = False,
) -> list[PackPayment]:
    """Give the token packs bought in the users' windows as grants, each once; safe to repeat.

    A pack is a token plan other than the subscription's, paid for after the window began (what is paid for within five
    minutes of that opened it). `since`: only payments from then on; None: all. `connection` is one of `db.connect()`:
    each batch is its own transaction. Raises `PaymentsNotMappedError`.
    """
    if mapping.payment.table is None:
        raise PaymentsNotMappedError(
            "The host's payments are not mapped: host.payment.table is not set. Nothing was granted. Set it under "
            "[host.payment] in trueup.toml, then run `trueup db init`."
        )
    check_text("by", by)
    found = [_payment(row) for row in connection.execute(_FIND, {"since": since})]
    if dry_run:
        return found
    wanted = [payment for payment in found if payment.outcome == "to_grant"]
    done: dict[tuple[UserId, str], PackPayment] = {}
    # One by one: each locks one user's balance, so that two imports at once never wait for each other crosswise.
    for payment in wanted:
        done |= _give(connection, mapping, [payment], by)
    return [
        done.get((payment.user_id, payment.reference), payment) if payment.outcome == "to_grant" else payment
        for payment in found
    ]


def _give(
    connection: Connection, mapping: HostMapping, batch: list[PackPayment], by: str
) -> dict[tuple[UserId, str], PackPayment]:
    values = {
        "users": [payment.user_id for payment in batch],
        "references": [payment.reference for payment in batch],
        "tokens": [payment.tokens for payment in batch],
        "paid_at": [payment.paid_at for payment in batch],
        "by": by,
    }
    rows = connection.execute(text(_GIVE.format(user_id_type=mapping.user_id_type)), values)
    return {(row.user_id, row.reference): _payment(row) for row in rows}


def _payment(row: Any) -> PackPayment:
    return PackPayment(**{name: getattr(row, name) for name in PackPayment.__dataclass_fields__})


_FIND = text(
    """
    SELECT p.user_id, p.reference, p.tokens, p.at AS paid_at, g.id AS grant_id,
           CASE WHEN row_number() OVER (PARTITION BY p.user_id, p.reference ORDER BY p.at, p.id) > 1
                THEN 'same_reference'
                WHEN g.id IS NULL THEN 'to_grant' WHEN g.revoked_at IS NOT NULL THEN 'revoked'
                WHEN g.tokens = p.tokens THEN 'already' ELSE 'other_figures' END AS outcome
    FROM trueup.purchases() p
    JOIN trueup.entitlements(clock_timestamp()) e ON e.user_id = p.user_id
    LEFT JOIN trueup.token_grant g ON g.user_id = p.user_id AND g.reference = p.reference
    WHERE p.kind = 'token plan' AND NOT p.own_plan AND p.tokens > 0
      AND p.at > e.window_start + interval '5 minutes' AND p.at <= clock_timestamp()
      AND (CAST(:since AS timestamptz) IS NULL OR p.at >= :since)
    ORDER BY p.user_id, p.at, p.reference
    """
)

# In order of user, so that two imports at once take the balances' locks in the same order.
_GIVE = """
    SELECT w.user_id, w.reference, w.tokens, w.paid_at, g.outcome, g.grant_id
    FROM (SELECT * FROM unnest(CAST(:users AS {user_id_type}[]), CAST(:references AS text[]),
                               CAST(:tokens AS bigint[]), CAST(:paid_at AS timestamptz[]))
              AS u (user_id, reference, tokens, paid_at)
          ORDER BY u.user_id, u.paid_at OFFSET 0) w
    CROSS JOIN LATERAL trueup.grant_tokens(w.user_id, w.tokens, 'token pack bought', w.reference, NULL, :by, NULL) g
"""
