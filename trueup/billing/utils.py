"""The specification's public face: what is left, and may it run? Both read the usage log's sums, never the counter."""

from typing import Any

from trueup.accounts.account import read_account
from trueup.accounts.user_ids import user_id_of
from trueup.accounts.validation import check_estimate
from trueup.database.retry import retrying
from trueup.gate.decision import check_access, denied_unknown_user
from trueup.gate.denial import Access


def get_accurate_tokens_remaining(user: Any) -> tuple[int, int, int]:
    """Return `(original_tokens, consumed_tokens, remaining_tokens)`, counts from the actual usage log.

    `user` is an id or any object with `.pk` or `.id`. Unknown users have (0, 0, 0).
    Raises `InvalidInputError` for a malformed id, `ServiceUnavailableError` when the database does not answer: never
    zeros in place of an answer.
    """
    user_id = user_id_of(user)
    if user_id is None:
        return 0, 0, 0
    account = retrying(lambda connection: read_account(connection, user_id))
    return account.original, account.consumed, account.remaining


def check_ai_access_for_user(user: Any, estimated_tokens: int, feature_name: str) -> Access:
    """Say whether the user may run a feature that needs about `estimated_tokens` tokens.

    `user` is an id or any object with `.pk` or `.id`; an unknown one reads as `no_subscription`. Nothing is reserved:
    two callers may both be told yes. Queued work goes through the gate of `metered_task`, which reserves.
    Raises `InvalidInputError` (a ValueError) for a negative or non-integer estimate, `ServiceUnavailableError` when the
    database does not answer.
    """
    check_estimate(estimated_tokens)
    user_id = user_id_of(user)
    if user_id is None:
        return denied_unknown_user()
    return retrying(lambda connection: check_access(connection, user_id, estimated_tokens, feature_name))
