"""The gate check that an endpoint makes before it queues a task. Only the task's own hold reserves tokens."""

from fastapi import Request

from trueup.accounts.user_ids import UserId
from trueup.api.views import metrics
from trueup.database.retry import retrying
from trueup.errors import TokensDenied
from trueup.gate.decision import check_access
from trueup.gate.denial import denial_payload
from trueup.gate.modes import mode_of


def require_tokens(request: Request, user_id: UserId, estimated_tokens: int, feature_name: str) -> None:
    """Return if a task of `estimated_tokens` may run now. It reserves nothing.

    Raises `TokensDenied`, which the API answers with 402 and the specification's body, or `ServiceUnavailableError`.
    """
    access = retrying(lambda connection: check_access(connection, user_id, estimated_tokens, feature_name))
    # In mode `observe` or `off` the task's own gate admits the task, and records the denial in mode `observe`.
    if not access["has_access"] and retrying(lambda connection: mode_of(connection, feature_name)) == "enforce":
        raise TokensDenied(denial_payload(access))
    metrics.of(request).count_decision()
