"""A user's subscription, and the plans on sale: `/api/billing/…`."""

from fastapi import APIRouter

from trueup.api.auth import CurrentUser
from trueup.api.errors import AUTHENTICATED, ApiError, responses
from trueup.api.schemas import BillingOverview, Plans, Subscription
from trueup.api.views.accounts import summary_of

router = APIRouter(prefix="/api/billing", tags=["billing"], responses=responses(*AUTHENTICATED))


@router.get("/overview")
def overview(user_id: CurrentUser) -> BillingOverview:
    """Show the subscription and its tokens."""
    return BillingOverview.of(summary_of(user_id))


@router.get("/subscription", responses=responses(404))
def subscription(user_id: CurrentUser) -> Subscription:
    """Show the current subscription with its token usage."""
    current = Subscription.of(summary_of(user_id))
    if current is None:
        raise ApiError(404, "no_subscription", "No subscription found")
    return current


@router.get("/plans")
def plans(user_id: CurrentUser) -> Plans:
    """List the plans on sale. The user's own come first, with their usage."""
    return Plans.of(summary_of(user_id, with_plans=True))
