"""A client of Instagram's Graph API for the two calls that answer a comment."""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from trueup.errors import SettingsError, TrueupError
from trueup.features.instagram.buttons import Button
from trueup.llm.credentials import header_value
from trueup.llm.texts import cut_at_word
from trueup.settings.settings import Settings

if TYPE_CHECKING:
    import httpx

# Rate limits of the app, the user, the page and the account:
# https://developers.facebook.com/docs/graph-api/guides/error-handling
RATE_LIMIT_CODES = frozenset({4, 17, 32, 613})
_DETAIL_CHARACTERS = 300


class GraphError(TrueupError):
    """Instagram refused a call or did not answer it.

    `retryable`: the same call may succeed later. `outcome_unknown`: the call was sent and may have taken effect; a
    retry could repeat the effect, so it is never retryable. `status`: HTTP's status; `code`: Graph's error code; None
    if the answer had none.
    """

    def __init__(
        self,
        message: str,
        *,
        retryable: bool = False,
        outcome_unknown: bool = False,
        status: int | None = None,
        code: int | None = None,
    ) -> None:
        self.message = message
        self.retryable = retryable
        self.outcome_unknown = outcome_unknown
        self.status = status
        self.code = code
        super().__init__(message)

    def __reduce__(self) -> tuple[object, ...]:
        options = {name: getattr(self, name) for name in ("retryable", "outcome_unknown", "status", "code")}
        return partial(GraphError, **options), (self.message,)


class GraphClient:
    """A client with one account's access token, which it sends in a header only. Close it, or use `with`."""

    def __init__(self, *, base_url: str, access_token: str, timeout_seconds: float) -> None:
        import httpx  # here, because to load it takes a tenth of a second, which most processes would spend for nothing

        self._token = access_token
        self._url = base_url.rstrip("/")
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {access_token}"}, timeout=timeout_seconds, follow_redirects=False
        )

    @classmethod
    def from_settings(cls, settings: Settings) -> "GraphClient":
        """Return a client for the configured account. Raises `SettingsError` if no access token is set."""
        token = header_value("TRUEUP_INSTAGRAM_ACCESS_TOKEN", settings.instagram_access_token)
        if not token:
            raise SettingsError(
                "TRUEUP_INSTAGRAM_ACCESS_TOKEN is not set, and Instagram refuses messages without it. Nothing was "
                "sent. Set it to the token of the account that answers."
            )
        return cls(
            base_url=settings.instagram_graph_url,
            access_token=token,
            timeout_seconds=settings.instagram_timeout_seconds,
        )

    def __enter__(self) -> "GraphClient":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def send_private_reply(
        self, *, account_id: str, comment_id: str, text: str, buttons: Sequence[Button] = ()
    ) -> str | None:
        """Send the one direct message that Instagram allows per comment. Returns its id; None if Instagram sent none.

        Raises `GraphError`.
        """
        message: dict[str, Any] = {"text": text}
        if buttons:
            payload = {"template_type": "button", "text": text, "buttons": [button.as_payload() for button in buttons]}
            message = {"attachment": {"type": "template", "payload": payload}}
        body = {"recipient": {"comment_id": comment_id}, "message": message}
        return _id_of(self._post(f"{account_id}/messages", body), "message_id")

    def reply_to_comment(self, *, comment_id: str, text: str) -> str | None:
        """Answer a comment publicly. Returns the reply's id; None if Instagram sent none. Raises `GraphError`."""
        return _id_of(self._post(f"{comment_id}/replies", {"message": text}), "id")

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        import httpx

        try:
            response = self._http.post(f"{self._url}/{path}", json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as error:
            raise GraphError(
                f"Instagram at {self._url} can't be reached ({self._safe(str(error))}). Nothing was sent. "
                "Check the network and TRUEUP_INSTAGRAM_GRAPH_URL.",
                retryable=True,
            ) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol):
            raise GraphError(
                f"{self._url} is not a valid address. Nothing was sent. Check TRUEUP_INSTAGRAM_GRAPH_URL."
            ) from None
        except httpx.HTTPError as error:
            raise GraphError(
                f"Instagram did not answer ({type(error).__name__}) after the call was sent. The call may have taken "
                "effect, so it is not repeated. Check the account's inbox before you send it again.",
                outcome_unknown=True,
            ) from None
        if not response.is_success:
            raise self._refusal(response)
        return _object(response)

    def _refusal(self, response: "httpx.Response") -> GraphError:
        stated = _object(response).get("error")
        error: dict[str, Any] = stated if isinstance(stated, dict) else {}
        code = error.get("code") if isinstance(error.get("code"), int) else None
        status = response.status_code
        detail = self._safe(str(error.get("message") or response.text)) or "no reason given"
        # An answer without Graph's error object is a gateway's; behind the gateway the call may have taken effect.
        if status == 504 or (status >= 500 and not error):
            return GraphError(
                f"Instagram's gateway answered HTTP {status} ({detail}). The call may have taken effect, so "
                "it is not repeated. Check the account's inbox before you send it again.",
                outcome_unknown=True,
                status=status,
                code=code,
            )
        limited = status == 429 or code in RATE_LIMIT_CODES
        return GraphError(
            f"Instagram refused the call with HTTP {status}, code {code}: {detail}. {_remedy(status, code, limited)}",
            retryable=limited or status >= 500,
            status=status,
            code=code,
        )

    def _safe(self, text: str) -> str:
        """Return one short line of the server's text, without the token."""
        line = " ".join(text.split())
        if self._token:
            line = line.replace(self._token, "***")
        return cut_at_word(line, _DETAIL_CHARACTERS).rstrip(".")


def _remedy(status: int, code: int | None, limited: bool) -> str:
    if limited:
        return "The account's call limit is reached. Try again later."
    if status == 401 or code == 190:
        return "Renew TRUEUP_INSTAGRAM_ACCESS_TOKEN."
    if status == 403 or code in (10, 200):
        return "Grant the app the permission to manage this account's comments and messages."
    if status >= 500:
        return "Try again later."
    return "The comment may be deleted, answered already, or older than 7 days."


def _object(response: "httpx.Response") -> dict[str, Any]:
    try:
        body = response.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _id_of(body: dict[str, Any], name: str) -> str | None:
    value = body.get(name)
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else None
