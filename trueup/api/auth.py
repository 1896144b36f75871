"""Authentication: verify the bearer token that the host has issued, and read its user and scopes.

`CurrentUser` gives an endpoint the user's id; `Operator` admits operators only. Both check the rate limit.
"""

from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import urlsplit

import jwt
from fastapi import Depends, Request, Security
from fastapi.security import HTTPBearer

from trueup.accounts.user_ids import UserId, parse_user_id
from trueup.api import limits
from trueup.api.errors import ApiError, unavailable
from trueup.api.keys import Keys, KeysUnavailableError, UnknownKeyError, keys_of
from trueup.errors import InvalidInputError, SettingsError
from trueup.host.mapping import UserIdType
from trueup.settings.api import ApiSettings
from trueup.settings.settings import Settings
from trueup.settings.urls import is_loopback

MAX_TOKEN_BYTES = 16_384
DEMO_HEADER = ("X-Trueup-Demo", "the bearer token is the user id; it is not verified")

_bearer = HTTPBearer(
    auto_error=False, bearerFormat="JWT", description="A token that the host issues, for example by simplejwt."
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A verified token. `user_id` None: it names no user, as a machine's token may. `subject`: the rate limit's key.

    `expires_at`: in seconds since 1970; None: never, as in the demo.
    """

    user_id: UserId | None
    subject: str
    scopes: frozenset[str]
    expires_at: float | None = None


# Added by proxies, to name the client or themselves.
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


class Verifier:
    """Verifies tokens by the settings. Raises `SettingsError` if they name no key, and enable neither demo nor page."""

    def __init__(self, settings: Settings) -> None:
        self._settings: ApiSettings = settings.api
        self._user_id_type: UserIdType = settings.host.user_id_type
        keys = keys_of(settings.api)
        if keys is None and not settings.api.demo and not settings.api.local_page:
            raise SettingsError(
                "No key is configured to verify tokens with. The API was not started. Set TRUEUP_API__JWT_SECRET, "
                "TRUEUP_API__JWKS_FILE or TRUEUP_API__JWKS_URL, or TRUEUP_API__DEMO=true to try it on this machine."
            )
        self._keys = keys

    def verify(self, request: Request, encoded: str) -> Token:
        """Return the verified token. Raises `ApiError` 401, or 503 if the issuer's keys are not available."""
        if len(encoded.encode()) > MAX_TOKEN_BYTES:
            raise refusal(f"The token has more than {MAX_TOKEN_BYTES} bytes")
        if self._keys is None and not self._settings.demo:
            raise refusal("The API has no key to verify tokens with, and serves only its page at /")
        if self._keys is None:
            return self._demo_token(request, encoded)
        return self._token(self._claims(self._keys, encoded))

    def _claims(self, keys: Keys, encoded: str) -> dict[str, Any]:
        try:
            key = keys.find(jwt.get_unverified_header(encoded))
            claims: dict[str, Any] = jwt.decode(
                encoded,
                key,
                # The key's algorithm, never the token's: otherwise a public key could be used as an HMAC secret.
                algorithms=[key.algorithm_name],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=self._settings.leeway_seconds,
                options={"require": ["exp"], "verify_sub": False, "verify_jti": False},
            )
        except KeysUnavailableError:
            raise unavailable("The issuer's keys are not available, so no token can be verified. Try again") from None
        except jwt.ExpiredSignatureError:
            raise refusal("The token has expired") from None
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError):
            raise refusal("The token is not for this API: wrong iss or aud") from None
        except jwt.MissingRequiredClaimError as error:
            raise refusal(f"The token has no {error.claim}") from None
        except (jwt.PyJWTError, UnknownKeyError, ValueError, TypeError, OverflowError, RecursionError):
            raise refusal("The token is not valid") from None
        # simplejwt's claim. A refresh token lives long and may only be exchanged for access tokens.
        if claims.get("token_type", "access") != "access":
            raise refusal("The token is not an access token")
        return claims

    def _token(self, claims: dict[str, Any]) -> Token:
        claimed = claims.get(self._settings.user_id_claim)
        scopes = claims.get(self._settings.scope_claim)
        words = scopes.split() if isinstance(scopes, str) else scopes if isinstance(scopes, list) else []
        user_id = None if claimed is None else self._parse(claimed)
        return Token(
            user_id=user_id,
            # A machine's name may equal a user's id; the prefix keeps their rate limits apart.
            subject=f"machine {claims.get('sub', '')}" if user_id is None else str(user_id),
            scopes=frozenset(word for word in words if isinstance(word, str)),
            expires_at=float(claims["exp"]),
        )

    def _parse(self, claimed: Any) -> UserId:
        try:
            return parse_user_id(claimed, self._user_id_type)
        except InvalidInputError:
            raise refusal(f"The token's {self._settings.user_id_claim} is not a user id of this host") from None

    def _demo_token(self, request: Request, encoded: str) -> Token:
        """Take the token as the user's id, for callers on this machine only."""
        if is_proxied(request):
            raise refusal("The demo answers no requests that a proxy passes on")
        if not is_from_this_machine(request):
            raise refusal("The demo answers callers on this machine only")
        user_id = self._parse(encoded)
        return Token(user_id=user_id, subject=str(user_id), scopes=frozenset({self._settings.operator_scope}))


def is_proxied(request: Request) -> bool:
    """Return whether a proxy has passed the request on: it may come from anywhere."""
    return any(header in request.headers for header in _FORWARDED)


def is_from_this_machine(request: Request) -> bool:
    """Return whether a program on this machine sent the request to this machine, without a proxy.

    The Host header must name this machine too: a web page in its browser could send requests under another name.
    """
    server, client = request.scope.get("server"), request.client
    names = (server and server[0], client and client.host, _named_host(request))
    return not is_proxied(request) and all(name and is_loopback(name) for name in names)


def _named_host(request: Request) -> str | None:
    """Return the host name in the request's Host header; None: it is missing or malformed.

    It does not use `request.url`, which falls back to this machine's own name for a malformed header.
    """
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def refusal(problem: str) -> ApiError:
    """Return the 401 answer for a token with this problem."""
    challenge = f'Bearer error="invalid_token", error_description="{problem}"'
    return ApiError(401, "not_authenticated", problem, headers={"WWW-Authenticate": challenge})


def checked_token(request: Request, credentials: Annotated[Any, Security(_bearer)]) -> Token:
    """Return the request's verified token. Raises `ApiError` 401, 429 or 503.

    It is not async, because it may block on requests to the issuer and Redis.
    """
    if credentials is None:
        raise ApiError(
            401,
            "not_authenticated",
            "The request has no token. Send it as Authorization: Bearer …",
            headers={"WWW-Authenticate": "Bearer"},
        )
    verifier: Verifier = request.app.state.verifier
    token = verifier.verify(request, credentials.credentials)
    limits.of(request).check(token.subject)
    return token


async def current_user(token: Annotated[Token, Depends(checked_token)]) -> UserId:
    """Return the id of the token's user. Raises `ApiError` 401 if the token names no user."""
    if token.user_id is None:
        raise refusal("The token names no user")
    return token.user_id


async def operator(request: Request, token: Annotated[Token, Depends(checked_token)]) -> Token:
    """Return an operator's token. Raises `ApiError` 403 if the token lacks the operator scope."""
    scope = request.app.state.settings.api.operator_scope
    if scope not in token.scopes:
        challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
        problem = f"The token lacks the scope {scope}"
        raise ApiError(403, "missing_scope", problem, headers={"WWW-Authenticate": challenge})
    return token


CurrentUser = Annotated[UserId, Depends(current_user)]
Operator = Annotated[Token, Depends(operator)]
