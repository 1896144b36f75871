"""The routes of the live page. They are for browsers, so they are not in the OpenAPI document."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse

from trueup.api.auth import is_from_this_machine
from trueup.api.errors import unavailable
from trueup.api.page import drifts
from trueup.api.page.live import MAX_PAGES, Live
from trueup.api.page.rendering import pages_of
from trueup.api.page.routes import PageRoute
from trueup.api.page.viewers import (
    AnyVisitor,
    Form,
    Operator,
    PageRefusal,
    keep_cookie,
    operator_of,
    verified_operator,
)
from trueup.database.retry import retrying
from trueup.errors import InvalidInputError
from trueup.monitoring.page_access import end_session, find_session, new_secret, open_session, use_link
from trueup.review.decisions import DecisionRefusedError

router = APIRouter(include_in_schema=False, route_class=PageRoute)

_SEE_OTHER = 303
# Sessions end long before; a token may name any later time.
_LATEST = 2**33

DriftNumber = Annotated[int, Path(ge=1, le=2**63 - 1)]
Link = Annotated[str, Path(min_length=20, max_length=100, pattern=r"^[A-Za-z0-9_-]+$")]


def live_of(request: Request) -> Live:
    """Return the state that all open pages of this process share."""
    live: Live = request.app.state.live
    return live


@router.get("/")
async def home(request: Request, viewer: Operator) -> Response:
    """Show the live page."""
    live = live_of(request)
    view = await live.view()

    def html(name: str) -> str:
        return view.parts[name].html if name in view.parts else ""

    return pages_of(request).answer(
        *(request, "live.html.jinja", viewer),
        status=503 if view.is_stale else 200,
        view=view,
        seen=live.identify(view),
        now=datetime.now(UTC),
        html=html,
    )


@router.get("/events")
async def events(request: Request, _viewer: Operator, seen: Annotated[str, Query(max_length=40)] = "") -> Response:
    """Send the changes of the live page while it is open."""
    live = live_of(request)
    if live.open_pages >= MAX_PAGES:
        raise unavailable(f"{MAX_PAGES} pages are open already. Nothing was done; try again later")

    async def stream() -> AsyncIterator[bytes]:
        async for event in live.events(request.headers.get("last-event-id") or seen, request.is_disconnected):
            yield event

    return StreamingResponse(stream(), media_type="text/event-stream")


@router.get("/drifts/{number}")
def drift(request: Request, viewer: Operator, number: DriftNumber) -> Response:
    """Show one drift, with the form for a decision if it is in review."""
    return _drift_page(request, viewer, number)


@router.post("/drifts/{number}")
def decide(request: Request, viewer: Operator, form: Form, number: DriftNumber) -> Response:
    """Make a person's decision, and show the drift again. Idempotent."""
    assert viewer.operator is not None  # noqa: S101 - for the type checker: an operator is known
    try:
        drifts.decide(number, form, viewer.operator)
    except InvalidInputError as error:
        return _drift_page(request, viewer, number, status=422, problem=str(error), given=form)
    except DecisionRefusedError as error:
        return _drift_page(request, viewer, number, status=409, problem=str(error), given=form)
    live_of(request).outdate()
    # So that a reload does not post again.
    return RedirectResponse(f"/drifts/{number}", _SEE_OTHER)


def _drift_page(
    request: Request,
    viewer: Operator,
    number: int,
    *,
    status: int = 200,
    problem: str = "",
    given: dict[str, str] | None = None,
) -> Response:
    page = drifts.read_drift(request.app.state.settings, number)
    if page is None:
        raise PageRefusal(404, f"There is no drift {number}", "`trueup drift review` lists the drifts in review.")
    values: dict[str, Any] = drifts.values_of(page, number)
    return pages_of(request).answer(
        *(request, "drift.html.jinja", viewer), status=status, problem=problem, given=given or {}, **values
    )


@router.get("/login/{link}")
def login_page(request: Request, visitor: AnyVisitor, link: Link) -> Response:
    """Show the button that uses a login link up. A program that only looks at the link does not."""
    return pages_of(request).answer(request, "login.html.jinja", visitor, link=link)


@router.post("/login/{link}")
def login_by_link(request: Request, visitor: AnyVisitor, _form: Form, link: Link) -> Response:
    """Exchange a login link for a session, once, on this machine only."""
    if not is_from_this_machine(request):
        sentence = "A login link works only in a browser on the machine of the API. Use an operator's token here."
        raise PageRefusal(403, "This link is for another machine", sentence, asks_login=True)
    secret = new_secret()
    # If the answer to the first try was lost, the retry finds the session that it opened.
    if retrying(lambda connection: use_link(connection, link, secret) or find_session(connection, secret)) is None:
        sentence = "It was used before, or is older than ten minutes. Run `trueup page` for a new one."
        raise PageRefusal(403, "This link does not open the page any more", sentence)
    return _signed_in(request, secret)


@router.post("/login")
def login_by_token(request: Request, _visitor: AnyVisitor, form: Form) -> Response:
    """Exchange an operator's token for a session, which ends when the token does."""
    token = verified_operator(request, form.get("token", "").strip())
    until = None if token.expires_at is None else datetime.fromtimestamp(min(token.expires_at, _LATEST), UTC)
    secret = new_secret()
    retrying(lambda connection: open_session(connection, secret, operator_of(token), until=until))
    return _signed_in(request, secret)


@router.post("/logout")
def logout(request: Request, viewer: AnyVisitor, _form: Form) -> Response:
    """End the session of this browser."""
    retrying(lambda connection: end_session(connection, viewer.cookie))
    return _signed_in(request, new_secret())


def _signed_in(request: Request, secret: str) -> Response:
    response = RedirectResponse("/", _SEE_OTHER)
    keep_cookie(request, response, secret)
    return response
