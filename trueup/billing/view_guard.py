"""What a view asks before its work, and what it answers when the answer is no: framework-free, decided in one place."""

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

# Reasons that are about the subscription as such, whatever is left of its tokens.
SUBSCRIPTION_REASONS = ("no_subscription", "subscription_deactivated", "subscription_expired")

# What a view's own work may raise and a gate has an answer for.
ANSWERED: tuple[type[TrueupError], ...] = (TokensDenied, HoldBusyError, ServiceUnavailableError, NotInstalledError)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """An answer in place of the view's: an HTTP status, a JSON body, headers."""

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
    """One question to ask of a user. `name`: the decorator it belongs to, for messages."""

    name: str
    ask: Callable[[Any], Access]

    def refusal(self, user: Any) -> Refusal | None:
        """Return what to answer this user; None: the view may run. Asks the database.

        Without an answer from it the view does not run: that is a refusal too.
        """
        try:
            access = self.ask(user)
        except (ServiceUnavailableError, NotInstalledError) as error:
            return refusal_for(error)
        return None if access["has_access"] else Refusal(status=402, body=denial_payload(access))


def token_gate(estimated_tokens: int, feature_name: str) -> Gate:
    """Return the gate that asks for so many tokens. Raises `InvalidInputError` for what is no count or no name."""
    tokens = check_estimate(estimated_tokens)
    feature = check_name(feature_name, "feature_name")
    return Gate(name="require_ai_tokens", ask=lambda user: _check_tokens(user, tokens, feature))


def _check_tokens(user: Any, tokens: int, feature: str) -> Access:
    user_id = user_id_of(user)
    if user_id is None:
        return denied_unknown_user()
    return retrying(lambda connection: check_gate(connection, user_id, tokens, feature))


def subscription_gate() -> Gate:
    """Return the gate that asks for a subscription that is active and has not ended, whatever is left of its tokens."""
    return Gate(name="require_active_subscription", ask=_check_subscription)


def _check_subscription(user: Any) -> Access:
    access = check_ai_access_for_user(user, 0, "")
    if access.get("reason") not in SUBSCRIPTION_REASONS:
        access["has_access"] = True
    return access


def refusal_for(error: TrueupError) -> Refusal:
    """Return what to answer for an error of `ANSWERED`. Where the servers are is for the log alone."""
    if isinstance(error, TokensDenied):
        return Refusal(status=402, body=error.payload)
    if isinstance(error, HoldBusyError):
        body = _body("This request is at work already", "request_in_progress")
        return Refusal(status=409, body=body, headers=_retry_after(RETRY_AFTER_SECONDS))
    logger.error("answered 503: %s", error, exc_info=error)
    if isinstance(error, NotInstalledError):
        body = _body("The database is not ready for trueup", "not_ready")
    else:
        body = _body("Tokens can't be checked or recorded now. Try again later", "service_unavailable")
    return Refusal(status=503, body=body, headers=_retry_after(RETRY_AFTER_SECONDS))


def _body(error: str, error_code: str) -> dict[str, Any]:
    return {"success": False, "error": error, "error_code": error_code}


def _retry_after(seconds: int) -> dict[str, str]:
    return {"Retry-After": str(seconds)}
