"""A user's account: `/api/accounts/…`."""

import logging

from fastapi import APIRouter

from trueup.accounts.summary import Summary, read_summary
from trueup.accounts.user_ids import UserId
from trueup.api.auth import CurrentUser, refusal
from trueup.api.errors import AUTHENTICATED, responses
from trueup.api.schemas import AccountOverview, Profile
from trueup.database.retry import retrying
from trueup.errors import SettingsError, TrueupError
from trueup.host.catalog import VIEWS_REMEDY, missing_view_columns
from trueup.settings.settings import get_settings

router = APIRouter(prefix="/api/accounts", tags=["accounts"], responses=responses(*AUTHENTICATED))

logger = logging.getLogger(__name__)


def check_columns() -> None:
    """Raise `SettingsError` for mapped columns that only the views read and that the host's tables lack.

    If the database does not answer, it logs a warning instead, because the columns can't be checked.
    """
    mapping = get_settings().host
    try:
        missing = retrying(lambda connection: missing_view_columns(connection, mapping))
    except TrueupError as error:
        logger.warning("columns of the views not checked reason=%s", error)
        return
    if missing:
        raise SettingsError(
            f"The host's tables have no column {', '.join(missing)}, which the views show. The API was not started. "
            f"{VIEWS_REMEDY}"
        )


def summary_of(user_id: UserId, *, with_plans: bool = False) -> Summary:
    """Return the user's summary, in one round trip. Raises `ApiError` 401 for a user that the host does not have."""
    mapping = get_settings().host
    summary = retrying(lambda connection: read_summary(connection, mapping, user_id, with_plans=with_plans))
    if not summary.known:
        raise refusal("The token's user does not exist")
    return summary


@router.get("/overview")
def overview(user_id: CurrentUser) -> AccountOverview:
    """Show the user, the subscription and the remaining tokens."""
    return AccountOverview.of(summary_of(user_id))


@router.get("/profile")
def profile(user_id: CurrentUser) -> Profile:
    """Show the user, and the remaining shares of the subscription's time and tokens, in percent."""
    return Profile.of(summary_of(user_id))
