"""Who may see the live page and decide on it, and which forms are its own.

An operator has a bearer token with the operator scope, a session that such a token or a login link opened, or a browser
on this machine where the page is open to it. Every form carries a token that belongs to the browser's cookie.
"""

import hmac
from dataclasses import dataclass, replace
from typing import Annotated
from urllib.parse import parse_qsl, urlsplit

from fastapi import Depends, Request, Response

from trueup.api import limits
from trueup.api.auth import Token, Verifier, is_from_this_machine
from trueup.api.errors import ApiError
from trueup.database.retry import retrying
from trueup.monitoring.page_access import find_session, form_token, new_secret
from trueup.settings.api import ApiSettings

COOKIE = "trueup_page"
# The operator of decisions where no login is asked for.
ANYONE_HERE = "a browser on this machine"
_MAX_FIELDS = 20


class PageRefusal(Exception):  # noqa: N818 - an answer, not a fault
    """The page refuses a request: what happened, and what to do. `asks_login`: show the login form below."""

    def __init__(self, status: int, title: str, sentence: str, *, asks_login: bool = False) -> None:
        super().__init__(status, title, sentence)
        self.status = status
        self.title = title
        self.sentence = sentence
        self.asks_login = asks_login


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """Who looks at a page. `operator`: for the audit; None: not known yet. `cookie`: the browser's secret.

    `is_new`: the browser does not have this cookie yet. `has_session`: there is a session to sign out of.
    """

    operator: str | None
    cookie: str
    is_new: bool
    has_session: bool = False

    @property
    def form_token(self) -> str:
        return form_token(self.cookie)


def visitor(request: Request) -> Viewer:
    """Return a viewer who is not known yet, as on the login page. Raises `PageRefusal` for another machine."""
    settings = _settings(request)
    if (settings.demo or settings.local_page) and not is_from_this_machine(request):
        raise PageRefusal(
            403,
            "This page is for this machine only",
            "The API has no key that verifies tokens, so it answers only browsers on its own machine, under the name "
            "127.0.0.1 or localhost, without a proxy. Set TRUEUP_API__JWT_SECRET to serve other machines.",
        )
    cookie = request.cookies.get(COOKIE, "")
    return Viewer(operator=None, cookie=cookie or new_secret(), is_new=not cookie)


def viewer(request: Request, found: Annotated[Viewer, Depends(visitor)]) -> Viewer:
    """Return the operator who looks. Raises `PageRefusal` 401 or 403, or `ApiError` 429. It may block."""
    scheme, _, encoded = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return replace(found, operator=operator_of(verified_operator(request, encoded.strip())))
    if not found.is_new:
        session = retrying(lambda connection: find_session(connection, found.cookie))
        if session is not None and (not session.is_local or is_from_this_machine(request)):
            limits.of(request).check(f"page {session.operator}")
            return replace(found, operator=session.operator, has_session=True)
    settings = _settings(request)
    if settings.demo or settings.local_page == "open":
        return replace(found, operator=ANYONE_HERE)
    raise PageRefusal(401, "Sign in", "This page is for operators. You are not signed in.", asks_login=True)


def verified_operator(request: Request, encoded: str) -> Token:
    """Return an operator's verified token. Raises `PageRefusal` 401 or 403, or `ApiError` 429 or 503."""
    verifier: Verifier = request.app.state.verifier
    try:
        token = verifier.verify(request, encoded)
    except ApiError as error:
        if error.status_code != 401:
            raise
        sentence = f"{error.detail}. Nothing was shown. Get a new token, or a login link from `trueup page`."
        raise PageRefusal(401, "This token does not open the page", sentence, asks_login=True) from None
    limits.of(request).check(token.subject)
    scope = _settings(request).operator_scope
    if scope not in token.scopes:
        sentence = f"The token lacks the scope {scope}, so it is not an operator's. Nothing was shown."
        raise PageRefusal(403, "This token does not open the page", sentence, asks_login=True)
    return token


def operator_of(token: Token) -> str:
    """Return the token's owner for the audit."""
    return token.subject if token.user_id is None else f"user {token.user_id}"


async def posted_form(request: Request) -> dict[str, str]:
    """Return the fields of a form of this page. Raises `PageRefusal` 403 for a form that another site sent.

    Three checks, because each has a gap in some browser: the cookie is SameSite=Strict, the request says which site
    sends it, and the form has a token that only this browser's page knows.
    """
    origin = request.headers.get("origin")
    sender = request.headers.get("sec-fetch-site", "same-origin")
    if sender != "same-origin" or (origin is not None and urlsplit(origin).netloc != request.headers.get("host")):
        raise PageRefusal(
            403,
            "Another site sent this form",
            "Nothing was written. Open the page itself and decide there. A proxy in front of it must pass the Host "
            "header on.",
        )
    body = (await request.body()).decode("utf-8", "replace")
    try:
        form = dict(parse_qsl(body, keep_blank_values=True, max_num_fields=_MAX_FIELDS))
    except ValueError:
        raise PageRefusal(422, "This form has too many fields", "Nothing was written. Reload the page.") from None
    cookie = request.cookies.get(COOKIE, "")
    given = form.pop("form_token", "").encode()
    if not cookie or not hmac.compare_digest(given, form_token(cookie).encode()):
        raise PageRefusal(
            403,
            "This form is out of date",
            "Nothing was written: the form does not belong to this browser's session. Reload the page and try again. "
            "The page needs its cookie.",
        )
    return form


def keep_cookie(request: Request, response: Response, secret: str) -> None:
    """Set the page's cookie. Beyond this machine a browser sends it over TLS only."""
    secure = not is_from_this_machine(request)
    response.set_cookie(COOKIE, secret, path="/", httponly=True, samesite="strict", secure=secure)


def _settings(request: Request) -> ApiSettings:
    settings: ApiSettings = request.app.state.settings.api
    return settings


AnyVisitor = Annotated[Viewer, Depends(visitor)]
Operator = Annotated[Viewer, Depends(viewer)]
Form = Annotated[dict[str, str], Depends(posted_form)]
