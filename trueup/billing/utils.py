"""The specification's functions for remaining tokens and access. They read the usage log's sums, never the counter."""

from typing import Any

from trueup.accounts.account import read_account
from trueup.accounts.host_connection import HostConnection
from trueup.accounts.user_ids import user_id_of
from trueup.accounts.validation import check_estimate
from trueup.database.retry import retrying
from trueup.gate.decision import check_access, denied_unknown_user
from trueup.gate.denial import Access


def get_accurate_tokens_remaining(user: Any) -> tuple[int, int, int]:
    """Return `(original_tokens, consumed_tokens, remaining_tokens)`, counts from the usage log.

    `user`: an id, or an object with `.pk` or `.id`. Unknown users have (0, 0, 0).
    Raises `InvalidInputError` for a malformed id, `ServiceUnavailableError` if the database does not answer; it never
    returns zeros in that case.
    """
    user_id = user_id_of(user)
    if user_id is None:
        return 0, 0, 0
    account = retrying(lambda connection: read_account(connection, user_id))
    return account.original, account.consumed, account.remaining


def check_ai_access_for_user(user: Any, estimated_tokens: int, feature_name: str, *, connection: Any = None) -> Access:
    """Return whether the user may run a feature that needs about `estimated_tokens` tokens (a count).

    `user`: an id, or an object with `.pk` or `.id`; an unknown user is denied with `no_subscription`. This reserves
    nothing, so it may admit two callers for the same tokens. `metered_task` and `ai_tokens` reserve tokens.

    `connection`: the host's own, to see a subscription that its open transaction has made and not committed:
    SQLAlchemy's `Connection` or `Session`, Django's `connection`, or psycopg's. It is read and never committed, and its
    role needs the rights of trueup's read-only role. Its errors are the driver's. None: trueup's own connection.
    Raises `InvalidInputError` (a ValueError) for a malformed estimate, `ServiceUnavailableError` if the database does
    not answer.
    """
    check_estimate(estimated_tokens)
    user_id = user_id_of(user)
    if user_id is None:
        return denied_unknown_user()
    if connection is None:
        return retrying(lambda own: check_access(own, user_id, estimated_tokens, feature_name))
    of_host = HostConnection(connection)
    with of_host.reading():
        return check_access(of_host, user_id, estimated_tokens, feature_name)
