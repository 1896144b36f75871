"""The API admits only tokens that the host's key has signed, and only while they are valid."""

import base64
import hashlib
import hmac
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fastapi.testclient import TestClient
from pytest_httpserver import HTTPServer
from werkzeug import Response

from tests.api.conftest import MakeClient
from tests.support.api import OPERATOR, SECRET, Clock, bearer, token
from tests.support.host import Host
from tests.support.sessions import in_background
from tests.support.waiting import DEADLINE_SECONDS
from trueup.errors import SettingsError
from trueup.settings.settings import get_settings
from trueup.worker.http import create_app

RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
PROFILE = "/api/accounts/profile"


def jwk(key: Any, **more: object) -> dict[str, object]:
    """Return the public part of a key as an entry of a JWKS."""
    kind = jwt.algorithms.RSAAlgorithm if isinstance(key, rsa.RSAPrivateKey) else jwt.algorithms.ECAlgorithm
    return {**kind.to_jwk(key.public_key(), as_dict=True), **more}


def jwks(*entries: dict[str, object]) -> str:
    return json.dumps({"keys": entries})


@pytest.fixture
def user(host: Host) -> int:
    return host.subscriber()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("trueup.api.keys.monotonic", clock)
    return clock


def status(client: TestClient, headers: dict[str, str]) -> int:
    answer = client.get(PROFILE, headers=headers)
    if answer.status_code == 401:
        assert answer.json()["error_code"] == "not_authenticated"
        assert answer.headers["www-authenticate"].startswith("Bearer")
    return answer.status_code


def test_a_token_of_the_host_admits_its_user(client: TestClient, user: int) -> None:
    assert client.get(PROFILE, headers=bearer(user)).json()["id"] == user
    assert client.get(PROFILE, headers=bearer(str(user))).json()["id"] == user


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic dXNlcjpwYXNz"},
        {"Authorization": "Bearer not.a.token"},
        {"Authorization": "Bearer " + "x" * 20_000},
        {"Authorization": "Bearer " + "[" * 5000},
        {"Authorization": "Bearer a.b.c.d.e"},
    ],
    ids=lambda headers: str(headers)[:40],
)
def test_a_request_without_a_valid_token_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    assert status(client, headers) == 401


def test_an_expired_or_not_yet_valid_token_is_refused(client: TestClient, user: int) -> None:
    now = int(time.time())
    assert status(client, bearer(user, exp=now - 60)) == 401
    assert status(client, bearer(user, nbf=now + 60)) == 401
    assert status(client, bearer(user, exp=now - 5)) == 200  # within the leeway between clocks
    assert status(client, bearer(user, exp=None)) == 401  # it would never expire
    assert status(client, bearer(user, exp="soon")) == 401


def test_a_token_of_another_key_and_an_altered_token_are_refused(client: TestClient, host: Host, user: int) -> None:
    other = host.subscriber()
    assert status(client, bearer(user, key="another secret that has 32 bytes or more")) == 401
    head, _, signature = token(user).split(".")
    forged = base64.urlsafe_b64encode(json.dumps({"user_id": other, "exp": time.time() + 60}).encode()).decode()
    assert status(client, {"Authorization": f"Bearer {head}.{forged.rstrip('=')}.{signature}"}) == 401


@pytest.mark.parametrize("algorithm", ["none", "None", "NONE", "HS384", "HS512"])
def test_a_token_cannot_choose_its_algorithm(client: TestClient, user: int, algorithm: str) -> None:
    known = algorithm.startswith("HS")
    signed = token(user, algorithm=algorithm) if known else token(user, key=None, algorithm="none")
    if not known:
        head = base64.urlsafe_b64encode(json.dumps({"alg": algorithm, "typ": "JWT"}).encode()).decode().rstrip("=")
        signed = f"{head}.{signed.split('.')[1]}."
    assert status(client, {"Authorization": f"Bearer {signed}"}) == 401


def test_a_public_key_is_not_accepted_as_a_secret(client_with: MakeClient, user: int, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(jwks(jwk(RSA_KEY, kid="one")))
    client = client_with(jwt_secret=None, jwks_file=file)
    pem = RSA_KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    parts = [{"alg": "HS256", "typ": "JWT", "kid": "one"}, {"user_id": user, "exp": int(time.time()) + 60}]
    signed = ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts)
    for secret in (pem, pem.strip(), file.read_bytes(), b""):
        mac = base64.urlsafe_b64encode(hmac.new(secret, signed.encode(), hashlib.sha256).digest()).decode()
        assert status(client, {"Authorization": f"Bearer {signed}.{mac.rstrip('=')}"}) == 401


@pytest.mark.parametrize("key", [RSA_KEY, EC_KEY], ids=["RS256", "ES256"])
def test_public_keys_come_from_a_file(client_with: MakeClient, user: int, tmp_path: Path, key: Any) -> None:
    algorithm = "RS256" if key is RSA_KEY else "ES256"
    file = tmp_path / "jwks.json"
    symmetric = {"kty": "oct", "kid": "secret", "k": base64.urlsafe_b64encode(SECRET.encode()).decode()}
    file.write_text(jwks(symmetric, jwk(key, kid="one"), jwk(RSA_KEY, kid="enc", use="enc")))
    client = client_with(jwt_secret=None, jwks_file=file)
    assert status(client, bearer(user, key=key, algorithm=algorithm, headers={"kid": "one"})) == 200
    assert status(client, bearer(user, key=key, algorithm=algorithm)) == 200  # there is only one usable key
    assert status(client, bearer(user, key=key, algorithm=algorithm, headers={"kid": "two"})) == 401
    assert status(client, bearer(user, key=SECRET, headers={"kid": "secret"})) == 401
    assert status(client, bearer(user, key=RSA_KEY, algorithm="RS256", headers={"kid": "enc"})) == 401


def test_the_api_does_not_start_with_a_file_without_a_usable_key(client_with: MakeClient, tmp_path: Path) -> None:
    file = tmp_path / "jwks.json"
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)  # noqa: S505 - weak on purpose
    for content in ("", "[]", "{}", '{"keys": 1}', '{"keys": [1]}', jwks(), jwks(jwk(weak)), jwks({"kty": "RSA"})):
        file.write_text(content)
        with pytest.raises(SettingsError, match="TRUEUP_API__JWKS_FILE"):
            client_with(jwt_secret=None, jwks_file=file)
    with pytest.raises(SettingsError, match="No such file"):
        client_with(jwt_secret=None, jwks_file=tmp_path / "missing.json")


class Issuer:
    """Serves a JWKS and counts the requests for it."""

    def __init__(self, server: HTTPServer) -> None:
        self.server, self.path = server, "/jwks.json"

    def serve(self, content: str, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.server.clear_all_handlers()
        self.server.expect_request(self.path).respond_with_data(content, status=status, headers=headers)

    @property
    def url(self) -> str:
        return self.server.url_for(self.path)

    @property
    def asked(self) -> int:
        return len(self.server.log)


def signed_by(key: Any, kid: str, user: int) -> dict[str, str]:
    algorithm = "RS256" if isinstance(key, rsa.RSAPrivateKey) else "ES256"
    return bearer(user, key=key, algorithm=algorithm, headers={"kid": kid})


def test_the_issuers_keys_are_read_once_and_again_for_an_unknown_key(
    client_with: MakeClient, user: int, httpserver: HTTPServer, clock: Clock
) -> None:
    issuer = Issuer(httpserver)
    issuer.serve(jwks(jwk(RSA_KEY, kid="one")))
    client = client_with(jwt_secret=None, jwks_url=issuer.url, jwks_retry_seconds=10, jwks_max_age_seconds=600)
    assert issuer.asked == 0
    assert [status(client, signed_by(RSA_KEY, "one", user)) for _ in range(3)] == [200] * 3
    assert issuer.asked == 1

    # Any client can send unknown keys; they must not cause a request to the issuer each time.
    clock.go_on(11)
    assert [status(client, signed_by(EC_KEY, "two", user)) for _ in range(20)] == [401] * 20
    assert issuer.asked == 2

    clock.go_on(11)
    issuer.serve(jwks(jwk(EC_KEY, kid="two")))
    assert status(client, signed_by(RSA_KEY, "one", user)) == 200
    assert status(client, signed_by(EC_KEY, "two", user)) == 200
    assert status(client, signed_by(RSA_KEY, "one", user)) == 401  # withdrawn


def test_the_issuers_keys_are_read_again_after_their_maximum_age(
    client_with: MakeClient, user: int, httpserver: HTTPServer, clock: Clock
) -> None:
    issuer = Issuer(httpserver)
    issuer.serve(jwks(jwk(RSA_KEY, kid="one")))
    client = client_with(jwt_secret=None, jwks_url=issuer.url, jwks_max_age_seconds=600)
    assert status(client, signed_by(RSA_KEY, "one", user)) == 200
    issuer.serve(jwks(jwk(EC_KEY, kid="one")))
    clock.go_on(599)
    assert status(client, signed_by(RSA_KEY, "one", user)) == 200
    clock.go_on(2)
    assert status(client, signed_by(RSA_KEY, "one", user)) == 401


@pytest.mark.parametrize("url", ["https://127.0.0.1:1/a\x7fb", "https://127.0.0.1:1/keys"])
def test_an_unreachable_issuer_is_503(client_with: MakeClient, user: int, url: str) -> None:
    client = client_with(jwt_secret=None, jwks_url=url)
    assert client.get(PROFILE, headers=signed_by(RSA_KEY, "one", user)).status_code == 503


def test_an_endless_answer_of_the_issuer_is_given_up(
    client_with: MakeClient, user: int, httpserver: HTTPServer, clock: Clock
) -> None:
    def drip() -> Iterator[bytes]:
        for _ in range(100):
            clock.go_on(1)
            sent.append(b" ")
            yield sent[-1]
            given_up.wait(0.05)
        yield jwks(jwk(RSA_KEY, kid="one")).encode()

    sent: list[bytes] = []
    given_up = threading.Event()
    httpserver.expect_request("/jwks.json").respond_with_handler(lambda _request: Response(drip()))
    client = client_with(jwt_secret=None, jwks_url=httpserver.url_for("/jwks.json"), jwks_timeout_seconds=3)
    assert client.get(PROFILE, headers=signed_by(RSA_KEY, "one", user)).status_code == 503
    assert len(sent) < 100
    given_up.set()


def test_a_request_with_a_known_key_does_not_wait_for_a_refresh_by_another(
    client_with: MakeClient, user: int, httpserver: HTTPServer, clock: Clock
) -> None:
    def answer(_request: object) -> Response:
        asked.set()
        served.wait(DEADLINE_SECONDS)
        return Response(jwks(jwk(RSA_KEY, kid="one")))

    asked, served = threading.Event(), threading.Event()
    served.set()
    httpserver.expect_request("/jwks.json").respond_with_handler(answer)
    client = client_with(jwt_secret=None, jwks_url=httpserver.url_for("/jwks.json"), jwks_timeout_seconds=25)
    headers = signed_by(RSA_KEY, "one", user)
    assert status(client, headers) == 200
    clock.go_on(10_000)
    asked.clear()
    served.clear()
    with in_background() as submit:
        first = submit(status, client, headers)
        try:
            assert asked.wait(DEADLINE_SECONDS)
            assert status(client, headers) == 200
            assert not first.done()
        finally:
            served.set()
        assert first.result() == 200


def test_while_the_issuer_is_down_known_keys_are_used_and_without_any_it_is_503(
    client_with: MakeClient, user: int, httpserver: HTTPServer, clock: Clock
) -> None:
    issuer = Issuer(httpserver)
    issuer.serve("down", 500)
    client = client_with(jwt_secret=None, jwks_url=issuer.url)
    answer = client.get(PROFILE, headers=signed_by(RSA_KEY, "one", user))
    assert (answer.status_code, answer.json()["error_code"]) == (503, "service_unavailable")
    assert int(answer.headers["retry-after"]) > 0

    clock.go_on(11)
    issuer.serve(jwks(jwk(RSA_KEY, kid="one")))
    assert status(client, signed_by(RSA_KEY, "one", user)) == 200
    for content, code, headers in (
        ("down", 500, {}),
        ("x" * 2_000_000, 200, {}),
        ("", 302, {"Location": "/elsewhere"}),
        (jwks(), 200, {}),
    ):
        issuer.serve(content, code, headers)
        clock.go_on(10_000)
        asked = issuer.asked
        assert status(client, signed_by(RSA_KEY, "one", user)) == 200
        assert issuer.asked == asked + 1
    assert all(request.path == issuer.path for request, _ in httpserver.log)


def test_issuer_and_audience_must_match_the_settings(client_with: MakeClient, user: int) -> None:
    client = client_with(issuer="https://shop.example", audience="trueup")
    good = {"iss": "https://shop.example", "aud": "trueup"}
    assert status(client, bearer(user, **good)) == 200
    assert status(client, bearer(user, **good | {"aud": ["other", "trueup"]})) == 200
    for wrong in ({"iss": "https://evil.example"}, {"aud": "other"}, {"iss": None}, {"aud": None}):
        assert status(client, bearer(user, **good | wrong)) == 401


def test_a_token_with_an_audience_is_refused_if_none_is_configured(client: TestClient, user: int) -> None:
    assert status(client, bearer(user, aud="mail")) == 401


@pytest.mark.parametrize("user_id", [None, True, 1.5, [], {}, "", "x", "1_0", 2**70, "１"])
def test_a_malformed_user_id_is_refused(client: TestClient, user_id: object) -> None:
    assert status(client, bearer(user_id)) == 401


def test_the_name_of_the_user_id_claim_is_configurable(client_with: MakeClient, user: int) -> None:
    client = client_with(user_id_claim="sub")
    assert status(client, bearer(None, sub=str(user))) == 200
    assert status(client, bearer(user)) == 401


def test_an_operators_token_has_the_operator_scope(client_with: MakeClient, user: int) -> None:
    client = client_with()
    path = "/api/drift/runs"
    for scope in (OPERATOR, f"read {OPERATOR}", [OPERATOR, "read"]):
        assert client.get(path, headers=bearer(user, scope=scope)).status_code == 200
        assert client.get(path, headers=bearer(None, sub="prometheus", scope=scope)).status_code == 200
    for scope in (None, "", "trueup:operators", f"{OPERATOR}s", [], {OPERATOR: 1}, 7, [[OPERATOR]]):
        refused = client.get(path, headers=bearer(user, scope=scope))
        assert (refused.status_code, refused.json()["error_code"]) == (403, "missing_scope")
        assert "insufficient_scope" in refused.headers["www-authenticate"]
    assert client.get(path).status_code == 401
    assert status(client, bearer(None, sub="prometheus", scope=OPERATOR)) == 401  # it names no user


def test_without_a_key_the_api_refuses_to_start(database: str) -> None:
    with pytest.raises(SettingsError, match="TRUEUP_API__JWT_SECRET") as refused:
        create_app()
    assert "was not started" in str(refused.value)


def test_the_demo_accepts_the_user_id_as_token_and_says_so(client_with: MakeClient, user: int) -> None:
    client = client_with(jwt_secret=None, demo=True)
    answer = client.get(PROFILE, headers={"Authorization": f"Bearer {user}"})
    assert (answer.status_code, answer.json()["id"]) == (200, user)
    assert "not verified" in answer.headers["x-trueup-demo"]
    assert status(client, {"Authorization": "Bearer x"}) == 401
    assert client.get("/api/drift/runs", headers={"Authorization": f"Bearer {user}"}).status_code == 200


@pytest.mark.parametrize(
    ("server", "caller", "host_header"),
    [
        ("192.0.2.7", "127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "192.0.2.9", "127.0.0.1"),
        ("127.0.0.1",) * 2 + ("evil.it",),
        ("127.0.0.1",) * 2 + ("{a}.evil.it",),
        ("127.0.0.1",) * 2 + ("[",),
    ],
    ids=[
        "served on another address",
        "called from another machine",
        "a page whose host name points to this machine",
        "a host name with invalid characters",
        "an unreadable host name",
    ],
)
def test_the_demo_answers_this_machine_only(
    client_with: MakeClient, user: int, server: str, caller: str, host_header: str
) -> None:
    app = client_with(jwt_secret=None, demo=True).app
    with TestClient(app, base_url=f"http://{server}", client=(caller, 1)) as client:
        assert status(client, {"Authorization": f"Bearer {user}", "Host": host_header}) == 401


@pytest.mark.parametrize("header", ["X-Forwarded-For", "X-Real-IP", "Forwarded", "Via", "X-Forwarded-Host"])
def test_the_demo_answers_no_request_that_a_proxy_passes_on(client_with: MakeClient, user: int, header: str) -> None:
    client = client_with(jwt_secret=None, demo=True)
    assert status(client, {"Authorization": f"Bearer {user}"}) == 200
    assert status(client, {"Authorization": f"Bearer {user}", header: "127.0.0.1"}) == 401


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"demo": True, "host": "0.0.0.0"}, "loopback only"),  # noqa: S104 - refused
        ({"demo": True, "jwt_secret": SECRET}, "Unset one"),
        ({"jwt_secret": "short"}, "32 random bytes"),
        ({"jwt_secret": SECRET, "jwks_url": "https://issuer.example/jwks"}, "Give one of them"),
        ({"jwks_url": "http://issuer.example/jwks"}, "not https"),
        ({"jwks_url": "https://me:pw@issuer.example/jwks"}, "without a password"),
        ({"jwks_url": "issuer"}, "give a URL"),
        ({"jwks_url": "https://issuer.example:port"}, "give a URL"),
        ({"prot": 1}, "no such setting"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unsafe_settings_are_refused(monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], named: str) -> None:
    for name, value in settings.items():
        monkeypatch.setenv(f"TRUEUP_API__{name.upper()}", str(value))
    get_settings.cache_clear()
    with pytest.raises(SettingsError, match=named) as refused:
        get_settings()
    assert "pw@" not in str(refused.value)
    get_settings.cache_clear()


SIMPLEJWT = """
import sys
import django
from django.conf import settings
settings.configure(
    SECRET_KEY=sys.argv[1], USE_TZ=True,
    INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes"], DATABASES={},
    SIMPLE_JWT={"SIGNING_KEY": sys.argv[1]},
)
django.setup()
from django.contrib.auth.models import User
from rest_framework_simplejwt.tokens import RefreshToken
refresh = RefreshToken.for_user(User(pk=int(sys.argv[2]), username="x", password="y"))
print(refresh.access_token, refresh)
"""


def test_access_tokens_of_simplejwt_are_accepted_and_its_refresh_tokens_are_not(client: TestClient, user: int) -> None:
    made = subprocess.run(
        [sys.executable, "-c", SIMPLEJWT, SECRET, str(user)], capture_output=True, text=True, check=True
    )
    access, refresh = made.stdout.split()
    assert status(client, {"Authorization": f"Bearer {access}"}) == 200
    refused = client.get(PROFILE, headers={"Authorization": f"Bearer {refresh}"})
    assert (refused.status_code, refused.json()["error"]) == (401, "The token is not an access token")
