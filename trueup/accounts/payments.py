"""Token packs in the host's payments, imported as grants: once for each payment."""

from dataclasses import dataclass, replace
from datetime import datetime

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_text
from trueup.errors import TrueupError
from trueup.host.mapping import HostMapping
from trueup.host.sql import render_statement


class PaymentsNotMappedError(TrueupError):
    """The mapping has no table of payments. Nothing was granted."""


@dataclass(frozen=True, kw_only=True)
class PackPayment:
    """A payment for a token pack. `tokens`: a count. `grant_id`: None if there is no grant for it.

    `outcome`: to_grant (dry run), granted, already; or why there is no grant: other_figures or revoked (the reference's
    grant has other tokens, or was revoked), same_reference (an earlier payment has it: recorded twice, or for another
    pack, which a person can grant), no_subscription (it was deleted meanwhile).
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
    """Grant the token packs that were bought in the users' current windows, each once; safe to repeat.

    A pack is a token plan other than the subscription's, paid more than five minutes after the start of the window; an
    earlier payment opened the window. `since`: only payments from this time on; None: all.
    `connection`: from `connect()`. Each grant is a transaction that locks one balance, so two imports can't deadlock.
    Raises `PaymentsNotMappedError`.
    """
    if mapping.payment.table is None:
        raise PaymentsNotMappedError(
            "The host's payments are not mapped: host.payment.table is not set. Nothing was granted. Set it under "
            "[host.payment] in trueup.toml, then run `trueup db init`."
        )
    check_text("by", by)
    statement = render_statement(_FIND, mapping)
    found = [PackPayment(**row) for row in connection.execute(statement, {"since": since}).mappings()]
    return [
        _grant(connection, payment, by) if payment.outcome == "to_grant" and not dry_run else payment
        for payment in found
    ]


def _grant(connection: Connection, payment: PackPayment, by: str) -> PackPayment:
    values = {"user": payment.user_id, "tokens": payment.tokens, "reference": payment.reference, "by": by}
    row = connection.execute(_GRANT, values).one()
    return replace(payment, outcome=row.outcome, grant_id=row.grant_id)


_GRANT = text("SELECT * FROM trueup.grant_tokens(:user, :tokens, 'token pack bought', :reference, NULL, :by, NULL)")
_FIND = """
    {% from "drift/host_records.sql" import is_pack %}
    SELECT p.user_id, p.reference, p.tokens, p.at AS paid_at, g.id AS grant_id,
           CASE WHEN row_number() OVER (PARTITION BY p.user_id, p.reference ORDER BY p.at, p.id) > 1
                THEN 'same_reference'
                WHEN g.id IS NULL THEN 'to_grant' WHEN g.revoked_at IS NOT NULL THEN 'revoked'
                WHEN g.tokens = p.tokens THEN 'already' ELSE 'other_figures' END AS outcome
    FROM trueup.purchases() p
    JOIN trueup.entitlements(clock_timestamp()) e ON e.user_id = p.user_id
    LEFT JOIN trueup.token_grant g ON g.user_id = p.user_id AND g.reference = p.reference
    WHERE {{ is_pack("p", "e.window_start") }} AND p.at <= clock_timestamp()
      AND (CAST(:since AS timestamptz) IS NULL OR p.at >= :since)
    ORDER BY p.user_id, p.at, p.reference
"""
