"""The check before a view's work, and the answers of a refused view, for all web frameworks."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trueup.accounts.user_ids import user_id_of
from trueup.accounts.validation import check_estimate
from trueup.billing.utils import check_ai_access_for_user
from trueup.database.retry import retrying
from trueup.errors import HoldBusyError, NotInstalledError, ServiceUnavailableError, TokensDenied, TrueupError
from trueup.gate.decision import check_gate, denied_unknown_user
from trueup.gate.denial import Access, denial_payload
from trueup.usage.validation import check_name

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 5

# Denials because of the subscription itself, whatever tokens it has left.
SUBSCRIPTION_REASONS = ("no_subscription", "subscription_deactivated", "subscription_expired")

# Errors of a view's own work that have an answer.
ANSWERED: tuple[type[TrueupError], ...] = (TokensDenied, HoldBusyError, ServiceUnavailableError, NotInstalledError)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """The answer of a refused view: an HTTP status, a JSON body, headers."""

    status: int
    body: Mapping[str, Any]
    headers: Mapping[str, str] = field(default_factory=dict)


NOT_AUTHENTICATED = Refusal(
    status=401,
    body={"success": False, "error": "Authentication required", "error_code": "not_authenticated"},
    headers={"WWW-Authenticate": "Bearer"},
)


@dataclass(frozen=True, kw_only=True)
class Gate:
    """A check of a user before a view. `name`: the decorator's, for messages."""

    name: str
    ask: Callable[[Any], Access]

    def refusal(self, user: Any) -> Refusal | None:
        """Return the refusal for this user; None: the view may run.

        If the database does not answer, the view is refused too.
        """
        try:
            access = self.ask(user)
        except (ServiceUnavailableError, NotInstalledError) as error:
            return refusal_for(error)
        return None if access["has_access"] else Refusal(status=402, body=denial_payload(access))


def token_gate(estimated_tokens: int, feature_name: str) -> Gate:
    """Return the check for a count of tokens. Raises `InvalidInputError` for a malformed count or name."""
    tokens = check_estimate(estimated_tokens)
    feature = check_name(feature_name, "feature_name")

    def check(user: Any) -> Access:
        user_id = user_id_of(user)
        if user_id is None:
            return denied_unknown_user()
        return retrying(lambda connection: check_gate(connection, user_id, tokens, feature))

    return Gate(name="require_ai_tokens", ask=check)


def subscription_gate() -> Gate:
    """Return the check for an active subscription that has not ended, whatever tokens it has left."""
    return Gate(name="require_active_subscription", ask=_check_subscription)


def _check_subscription(user: Any) -> Access:
    access = check_ai_access_for_user(user, 0, "")
    if access.get("reason") not in SUBSCRIPTION_REASONS:
        access["has_access"] = True
    return access


def refusal_for(error: TrueupError) -> Refusal:
    """Return the answer for an error of `ANSWERED`. Only the log names the servers."""
    if isinstance(error, TokensDenied):
        return Refusal(status=402, body=error.payload)
    if isinstance(error, HoldBusyError):
        return _retry_later(409, "request_in_progress", "This request is already in progress")
    logger.error("answered 503 reason=%s", error, exc_info=error)
    if isinstance(error, NotInstalledError):
        return _retry_later(503, "not_ready", "The database is not ready for trueup")
    return _retry_later(503, "service_unavailable", "Tokens can't be checked or recorded now. Try again later")


def _retry_later(status: int, error_code: str, error: str) -> Refusal:
    body = {"success": False, "error": error, "error_code": error_code}
    return Refusal(status=status, body=body, headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
