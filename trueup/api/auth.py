"""Who may in: the bearer token that the host has issued, and what it allows.

`CurrentUser` gives an endpoint the user's id, `Operator` lets operators in alone; both check the rate limit.
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
DEMO_HEADER = ("X-Trueup-Demo", "the bearer token is the user id; nobody is authenticated")

_bearer = HTTPBearer(
    auto_error=False, bearerFormat="JWT", description="A token of the host's, as of djangorestframework-simplejwt."
)


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token that was checked. `user_id` None: it is nobody's, as a machine's may be."""

    user_id: UserId | None
    subject: str
    scopes: frozenset[str]


class Verifier:
    """Checks tokens as the settings say. Raises `SettingsError` when they name no key and no demo."""

    def __init__(self, settings: Settings) -> None:
        self._settings: ApiSettings = settings.api
        self._user_id_type: UserIdType = settings.host.user_id_type
        keys = keys_of(settings.api)
        if keys is None and not settings.api.demo:
            raise SettingsError(
                "The API has no key to check tokens with. It was not started. Set TRUEUP_API__JWT_SECRET, "
                "TRUEUP_API__JWKS_FILE or TRUEUP_API__JWKS_URL; to try it on this machine alone, TRUEUP_API__DEMO=true."
            )
        self._keys = keys

    def verify(self, request: Request, encoded: str) -> Token:
        """Return the token's content. Raises `ApiError` 401 or, without the issuer's keys, 503."""
        if len(encoded.encode()) > MAX_TOKEN_BYTES:
            raise refusal("The token is too long")
        if self._keys is None:
            return self._demo_token(request, encoded)
        return self._token(self._claims(self._keys, encoded))

    def _claims(self, keys: Keys, encoded: str) -> dict[str, Any]:
        try:
            key = keys.find(jwt.get_unverified_header(encoded))
            claims: dict[str, Any] = jwt.decode(
                encoded,
                key,
                # Of the key, never of the token: else a public key could be used as an HMAC secret.
                algorithms=[key.algorithm_name],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=self._settings.leeway_seconds,
                options={"require": ["exp"], "verify_sub": False, "verify_jti": False},
            )
        except KeysUnavailableError:
            raise unavailable("The issuer's keys can't be had now, so that no token can be checked") from None
        except jwt.ExpiredSignatureError:
            raise refusal("The token has expired") from None
        except (jwt.InvalidIssuerError, jwt.InvalidAudienceError):
            raise refusal("The token is not meant for this API: wrong iss or aud") from None
        except jwt.MissingRequiredClaimError as error:
            raise refusal(f"The token has no {error.claim}") from None
        except (jwt.PyJWTError, UnknownKeyError, ValueError, TypeError, OverflowError, RecursionError):
            raise refusal("The token is not valid") from None
        # simplejwt's: a refresh token lives long and is for getting access tokens alone.
        if claims.get("token_type", "access") != "access":
            raise refusal("This is no access token")
        return claims

    def _token(self, claims: dict[str, Any]) -> Token:
        claimed = claims.get(self._settings.user_id_claim)
        scopes = claims.get(self._settings.scope_claim)
        words = scopes.split() if isinstance(scopes, str) else scopes if isinstance(scopes, list) else []
        user_id = None if claimed is None else self._parse(claimed)
        return Token(
            user_id=user_id,
            # A machine may have any name: it is not counted as the user whose id that is.
            subject=f"machine {claims.get('sub', '')}" if user_id is None else str(user_id),
            scopes=frozenset(word for word in words if isinstance(word, str)),
        )

    def _parse(self, claimed: Any) -> UserId:
        try:
            return parse_user_id(claimed, self._user_id_type)
        except InvalidInputError:
            raise refusal(f"The token's {self._settings.user_id_claim} is no user id of this host") from None

    def _demo_token(self, request: Request, encoded: str) -> Token:
        """Take the token for the user's id: from this machine alone, and not from a page in its browser."""
        server, client = request.scope.get("server"), request.client
        names = (server and server[0], client and client.host, _named_host(request))
        if not all(name and is_loopback(name) for name in names):
            raise refusal("The demo is for this machine only")
        user_id = self._parse(encoded)
        return Token(user_id=user_id, subject=str(user_id), scopes=frozenset({self._settings.operator_scope}))


def _named_host(request: Request) -> str | None:
    """Return what the caller calls this machine; None: nothing that can be read.

    Not from the request's URL: that has this machine's own name where the caller's can't be read.
    """
    try:
        return urlsplit(f"//{request.headers.get('host', '')}").hostname
    except ValueError:
        return None


def refusal(problem: str) -> ApiError:
    """Return the 401 that says so."""
    challenge = f'Bearer error="invalid_token", error_description="{problem}"'
    return ApiError(401, "not_authenticated", problem, headers={"WWW-Authenticate": challenge})


def checked_token(request: Request, credentials: Annotated[Any, Security(_bearer)]) -> Token:
    """Return the request's token; raises `ApiError` 401, 429 or 503. Not async: it may ask the issuer and Redis."""
    if credentials is None:
        raise ApiError(
            401,
            "not_authenticated",
            "Send a token: Authorization: Bearer …",
            headers={"WWW-Authenticate": "Bearer"},
        )
    verifier: Verifier = request.app.state.verifier
    token = verifier.verify(request, credentials.credentials)
    limits.of(request).check(token.subject)
    return token


async def current_user(token: Annotated[Token, Depends(checked_token)]) -> UserId:
    """Return the id of the token's user. Raises `ApiError` 401 for a machine's token."""
    if token.user_id is None:
        raise refusal("The token names no user")
    return token.user_id


async def operator(request: Request, token: Annotated[Token, Depends(checked_token)]) -> Token:
    """Return the token of an operator. Raises `ApiError` 403 when it lacks the scope."""
    scope = request.app.state.settings.api.operator_scope
    if scope not in token.scopes:
        challenge = f'Bearer error="insufficient_scope", scope="{scope}"'
        raise ApiError(403, "missing_scope", f"This needs the scope {scope}", headers={"WWW-Authenticate": challenge})
    return token


CurrentUser = Annotated[UserId, Depends(current_user)]
Operator = Annotated[Token, Depends(operator)]
