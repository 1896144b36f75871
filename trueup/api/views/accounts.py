"""What a user is shown of the account: `/api/accounts/…`."""

import logging

from fastapi import APIRouter

from trueup.accounts.overview import Summary, read_summary
from trueup.accounts.user_ids import UserId
from trueup.api.auth import CurrentUser, refusal
from trueup.api.responses import AUTHENTICATED, responses
from trueup.api.schemas import AccountOverview, Profile
from trueup.database.retry import retrying
from trueup.errors import SettingsError, TrueupError
from trueup.host.catalog import VIEWS_REMEDY, missing_view_columns
from trueup.settings.settings import get_settings

router = APIRouter(prefix="/api/accounts", tags=["accounts"], responses=responses(*AUTHENTICATED))

logger = logging.getLogger(__name__)


def check_columns() -> None:
    """Raise `SettingsError` for columns of the mapping that only the views read, and that the host does not have.

    Where the database can't be asked nothing is known of that, and nothing is raised.
    """
    mapping = get_settings().host
    try:
        missing = retrying(lambda connection: missing_view_columns(connection, mapping))
    except TrueupError as error:
        logger.warning("The columns that the views show were not looked at: %s", error)
        return
    if missing:
        raise SettingsError(f"There is no column {', '.join(missing)}, which the views would show. {VIEWS_REMEDY}")


def summary_of(user_id: UserId, *, with_plans: bool = False) -> Summary:
    """Return the user's summary, in one round trip. Raises `ApiError` 401 for a user that the host has not."""
    mapping = get_settings().host
    summary = retrying(lambda connection: read_summary(connection, mapping, user_id, with_plans=with_plans))
    if not summary.known:
        raise refusal("The token is of a user that is not there any more")
    return summary


@router.get("/overview")
def overview(user_id: CurrentUser) -> AccountOverview:
    """Show the user, the subscription and the tokens that are left."""
    return AccountOverview.of(summary_of(user_id))


@router.get("/profile")
def profile(user_id: CurrentUser) -> Profile:
    """Show the user, and how much of the subscription and the tokens is left, in percent."""
    return Profile.of(summary_of(user_id))
