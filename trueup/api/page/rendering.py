"""Whole pages: the head, the style, the script, and the policy that allows nothing else."""

from typing import Any

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment

from trueup.api.page.parts import PACKAGE
from trueup.api.page.viewers import PageRefusal, Viewer, keep_cookie
from trueup.reports.pages import STYLE, environment, integrity, read_part
from trueup.settings.settings import Settings, host_name


class Pages:
    """The templates of one process, with the style and the script that every page has."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._style = read_part("trueup.reports", STYLE) + read_part(PACKAGE, "live.css")
        self._script = read_part(PACKAGE, "live.js")
        self.environment: Environment = environment(PACKAGE)
        self._policy = "; ".join(
            (
                "default-src 'none'",
                f"style-src '{integrity(self._style)}'",
                f"script-src '{integrity(self._script)}'",
                "connect-src 'self'",
                "img-src data:",
                "form-action 'self'",
                "frame-ancestors 'none'",
                "base-uri 'none'",
            )
        )

    def answer(
        self, request: Request, template: str, viewer: Viewer | None, *, status: int = 200, **values: Any
    ) -> HTMLResponse:
        """Return a page for a viewer; None: forms are not taken. `values`: of its template."""
        made = self.environment.get_template(template).render(
            style=self._style,
            script=self._script,
            host=host_name(self._settings),
            takes_tokens=self._settings.api.has_key,
            viewer=viewer,
            **values,
        )
        response = HTMLResponse(made, status)
        response.headers["Content-Security-Policy"] = self._policy
        # With no-referrer a browser hides the origin of the page's own forms.
        response.headers["Referrer-Policy"] = "same-origin"
        if viewer is not None and viewer.is_new:
            keep_cookie(request, response, viewer.cookie)
        return response

    def refusal(self, request: Request, viewer: Viewer | None, refused: PageRefusal) -> HTMLResponse:
        """Return the page that tells a refusal, with the login form if signing in helps."""
        return self.answer(
            request,
            "refusal.html.jinja",
            viewer,
            status=refused.status,
            title=refused.title,
            sentence=refused.sentence,
            asks_login=refused.asks_login and viewer is not None,
        )


def pages_of(request: Request) -> Pages:
    """Return the templates of the request's application."""
    pages: Pages = request.app.state.pages
    return pages
