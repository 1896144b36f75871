"""The live page over HTTP: who may see it, what it shows, and the decisions that it takes."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Connection, create_engine
from sqlalchemy.pool import NullPool

from tests.api.conftest import MakeClient
from tests.support.api import OPERATOR, SECRET, bearer, token
from tests.support.drift_history import add_drift, add_run
from tests.support.host import Host
from tests.support.page import cookie_of, credited, drift_in_review, post, sign_in, token_of
from tests.support.work import hold_tokens
from trueup.api.page.viewers import COOKIE
from trueup.database.engine import connect, dispose_engine, get_engine
from trueup.errors import SettingsError, TokensDenied
from trueup.gate.modes import set_mode
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.monitoring.page_access import SESSION_LIVES, find_session, make_link, use_link
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings
from trueup.worker.http import create_app

OPS = bearer(None, sub="ops", scope=OPERATOR)


def decisions(host: Host) -> list[tuple[Any, ...]]:
    rows = host.execute(
        "SELECT decision, component, decided_by, note, counter_after FROM trueup.drift_decision ORDER BY id"
    )
    return [tuple(row) for row in rows]


# Who may see it


@pytest.mark.parametrize("path", ["/", "/events", "/drifts/1"])
def test_a_stranger_sees_the_login_form_and_nothing_else(client: TestClient, host: Host, path: str) -> None:
    user = credited(host)
    answer = client.get(path)
    assert answer.status_code == 401
    assert answer.headers["content-type"].startswith("text/html")
    assert "trueup page" in answer.text
    assert "Review queue" not in answer.text
    assert f">{user}<" not in answer.text


def test_a_token_needs_the_operator_scope(client: TestClient, host: Host) -> None:
    user = host.subscriber()
    assert client.get("/", headers=bearer(user, scope=OPERATOR)).status_code == 200
    assert client.get("/", headers=OPS).status_code == 200
    lacking = client.get("/", headers=bearer(user))
    assert (lacking.status_code, OPERATOR in lacking.text) == (403, True)
    expired = client.get("/", headers=bearer(user, scope=OPERATOR, exp=1))
    assert (expired.status_code, "expired" in expired.text) == (401, True)


def test_a_token_in_the_form_opens_a_session_that_ends_with_it(client: TestClient, connection: Connection) -> None:
    ends = datetime.now(UTC) + timedelta(minutes=5)
    signed = token(None, sub="ops", scope=OPERATOR, exp=int(ends.timestamp()))
    answer = post(client, "/login", client.get("/"), token=signed)
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert client.get("/").status_code == 200
    session = find_session(connection, cookie_of(client))
    assert session is not None
    assert (session.operator, session.is_local) == ("machine ops", False)
    assert session.expires_at == ends.replace(microsecond=0)
    assert find_session(connection, cookie_of(client), now=ends) is None


@pytest.mark.parametrize(
    ("signed", "status", "why"),
    [("", 401, "not valid"), (token(1), 403, OPERATOR), (token(1, scope=OPERATOR, exp=1), 401, "expired")],
)
def test_a_wrong_token_in_the_form_opens_nothing(
    client: TestClient, host: Host, signed: str, status: int, why: str
) -> None:
    answer = post(client, "/login", client.get("/"), token=signed)
    assert (answer.status_code, why in answer.text) == (status, True)
    assert client.get("/").status_code == 401
    assert host.value("SELECT count(*) FROM trueup.page_access") == 0


def test_a_login_link_opens_one_session_once(client: TestClient, connection: Connection, host: Host) -> None:
    path = f"/login/{make_link(connection, 'ann')}"
    # A program that looks at the link, such as a chat's preview, does not use it up.
    shown = [client.get(path) for _ in range(3)]
    assert client.get("/").status_code == 401
    before = cookie_of(client)
    assert post(client, path, shown[-1]).status_code == 303
    assert cookie_of(client) != before
    assert client.get("/").status_code == 200
    client.cookies.clear()
    again = post(client, path, client.get(path))
    assert (again.status_code, "used before" in again.text) == (403, True)
    assert client.get("/").status_code == 401
    assert host.value("SELECT count(*) FROM trueup.page_access WHERE kind = 'link'") == 0


def test_of_many_requests_with_one_link_one_opens_a_session(database: str) -> None:
    with connect() as connection:
        link = make_link(connection, "ann")
    start = threading.Barrier(4)

    def use(number: int) -> bool:
        with connect() as connection:
            start.wait()
            return use_link(connection, link, f"session {number}") is not None

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(use, range(4))) == [False, False, False, True]


def test_a_link_is_too_old_after_ten_minutes_and_a_session_after_twelve_hours(connection: Connection) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    late = make_link(connection, "ann", now=now)
    assert use_link(connection, late, "one", now=now + timedelta(minutes=10)) is None
    link = make_link(connection, "ann", now=now)
    assert use_link(connection, link, "two", now=now + timedelta(minutes=9)) is not None
    opened = now + timedelta(minutes=9)
    assert find_session(connection, "two", now=opened + SESSION_LIVES - timedelta(seconds=1)) is not None
    assert find_session(connection, "two", now=opened + SESSION_LIVES) is None
    assert find_session(connection, link, now=now) is None


def test_no_secret_is_stored(client: TestClient, connection: Connection, host: Host) -> None:
    path = sign_in(client, connection)
    [row] = host.execute("SELECT t::text FROM trueup.page_access t").all()
    assert path.removeprefix("/login/") not in row[0]
    assert cookie_of(client) not in row[0]


def test_a_link_and_its_session_are_for_this_machine_only(client: TestClient, connection: Connection) -> None:
    path = f"/login/{make_link(connection, 'ann')}"
    page = client.get(path)
    for headers in ({"X-Forwarded-For": "10.0.0.7"}, {"Host": "evil.example"}):
        answer = client.post(path, data={"form_token": token_of(page)}, headers=headers, follow_redirects=False)
        assert answer.status_code == 403, headers
    assert post(client, path, page).status_code == 303
    assert client.get("/").status_code == 200
    assert client.get("/", headers={"X-Forwarded-For": "10.0.0.7"}).status_code == 401
    cookie = {"Cookie": f"{COOKIE}={cookie_of(client)}"}
    assert client.get("/", headers={"Host": "evil.example", **cookie}).status_code == 401


def test_signing_out_ends_the_session_on_the_server(client: TestClient, connection: Connection) -> None:
    sign_in(client, connection)
    session = cookie_of(client)
    page = client.get("/")
    assert "Sign out" in page.text
    assert post(client, "/logout", page).status_code == 303
    client.cookies.clear()
    client.cookies.set(COOKIE, session)
    assert client.get("/").status_code == 401


@pytest.fixture(params=["open", "demo"])
def open_page(client_with: MakeClient, request: pytest.FixtureRequest) -> TestClient:
    """A page that asks this machine for no login."""
    given = {"local_page": "open"} if request.param == "open" else {"demo": "true"}
    return client_with(jwt_secret=None, **given)


def test_without_a_key_the_page_is_open_to_this_machine_only(open_page: TestClient) -> None:
    assert open_page.get("/").status_code == 200
    for headers in (
        {"Host": "rebound.example"},
        {"Host": "127.0.0.1.nip.io"},
        {"Host": ""},
        {"X-Forwarded-For": "127.0.0.1"},
        {"Via": "1.1 proxy"},
    ):
        answer = open_page.get("/", headers=headers)
        assert (answer.status_code, "this machine" in answer.text) == (403, True), headers
        assert "form_token" not in answer.text
    elsewhere = TestClient(open_page.app, base_url="http://127.0.0.1", client=("10.0.0.7", 50000))
    assert elsewhere.get("/").status_code == 403
    assert elsewhere.get("/events").status_code == 403


def test_a_page_by_links_alone_asks_for_one(client_with: MakeClient, connection: Connection) -> None:
    client = client_with(jwt_secret=None, local_page="login")
    assert client.get("/").status_code == 401
    assert 'name="token"' not in client.get("/").text
    refused = client.get("/api/billing/plans", headers=bearer(1))
    assert (refused.status_code, "no key" in refused.json()["error"]) == (401, True)
    sign_in(client, connection)
    assert client.get("/").status_code == 200


@pytest.mark.parametrize(
    "settings",
    [
        {"local_page": "open", "jwt_secret": None, "host": "0.0.0.0"},  # noqa: S104 - refused
        {"local_page": "open"},
        {"local_page": "login", "jwt_secret": None, "demo": "true"},
        {"local_page": "all", "jwt_secret": None},
    ],
)
def test_a_page_without_a_key_is_never_served_to_other_machines(client_with: MakeClient, settings: Any) -> None:
    with pytest.raises(SettingsError, match="local_page"):
        client_with(**settings)


# What it sends


def test_every_answer_has_a_strict_policy_and_the_cookie_is_for_this_site_only(client: TestClient) -> None:
    answers = [client.get(path, headers=OPS) for path in ("/", "/docs", "/nowhere", "/drifts/7")] + [client.get("/")]
    for answer in answers:
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-store"
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")
        assert len(answer.headers.get_list("content-security-policy")) == 1
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert not re.findall(r"""(?:src|href)=["']?(?:https?:)?//""", answer.text)
        assert not re.findall(r"""\s(?:on\w+|style)=["']""", answer.text)
    first = TestClient(client.app, base_url="http://127.0.0.1", client=("127.0.0.1", 50000)).get("/")
    assert re.search(rf"^{COOKIE}=[\w-]{{43}}; HttpOnly; Path=/; SameSite=strict$", first.headers["set-cookie"])
    away = TestClient(client.app, base_url="http://ops.example", client=("10.0.0.7", 50000)).get("/")
    assert away.headers["set-cookie"].endswith("; Secure")


def test_the_page_shows_what_is_at_stake(client: TestClient, connection: Connection, host: Host) -> None:
    user = credited(host)
    short = host.subscriber(1_000)
    host.log(short, 700)
    drift = drift_in_review(host, user)
    hold_tokens(connection, short, 250)
    text = client.get("/", headers=OPS).text
    for heading in ("Review queue", "Balances at risk", "Holds now", "Drift over time", "Denials by reason"):
        assert f"<h2>{heading}</h2>" in text
    for heading in ("Reconcile runs", "Queues and workers", "Alerts"):
        assert f"<h2>{heading}</h2>" in text
    assert f'<a href="/drifts/{drift}" aria-label="Decide about drift {drift}">' in text
    assert re.search(
        rf'data-label="User"><bdi>{short}</bdi></td><td role="cell" data-label="Available" class="number"><bdi>50<',
        text,
    )
    assert re.search(r'data-label="Held" class="number"><bdi>250<', text)
    assert len(text.encode()) < 100_000


def test_denials_are_shown_by_reason_whether_enforced_or_observed(
    client: TestClient, connection: Connection, host: Host
) -> None:
    user = host.subscriber(100)
    for _ in range(2):
        with pytest.raises(TokensDenied):
            hold_tokens(connection, user, 1_000)
    set_mode(connection, "*", "observe", changed_by="ann", note="a trial")
    hold_tokens(connection, user, 3_000)
    text = client.get("/", headers=OPS).text
    row = re.search(r'data-label="Reason"><bdi>insufficient tokens</bdi>.*?</tr>', text)
    assert row
    assert re.findall(r"<bdi>([\d,]+)</bdi>", row[0])[:4] == ["2", "1", "5,000", "1"]


def test_a_page_of_an_empty_host_says_so_in_sentences(client: TestClient, database: str) -> None:
    text = client.get("/", headers=OPS).text
    for sentence in (
        "No drift waits for a person.",
        "No user who spends now is short of tokens.",
        "No task holds tokens now.",
        "There has been no reconcile run yet.",
        "There are no alerts.",
    ):
        assert sentence in text


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</script>\u202e", "'-alert(3)-'")


def test_nothing_of_a_host_becomes_markup(empty_database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEUP_HOST__USER_ID_TYPE", "text")
    monkeypatch.setenv("TRUEUP_NAME", HOSTILE[0])
    monkeypatch.setenv("TRUEUP_API__JWT_SECRET", SECRET)
    get_settings.cache_clear()
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, HostMapping(user_id_type="text"), with_host_tables=True)
    app = create_app()
    with Host(engine) as host, closing(app.state.celery), TestClient(app, base_url="http://127.0.0.1") as client:
        run = add_run(host)
        found = [
            add_drift(host, run, text, 20, 10, (text, 10), action="review", reason=text, certainty="possible")
            for text in HOSTILE
        ]
        host.execute(
            "INSERT INTO trueup.alert (key, kind, channel, payload, status, next_attempt_at, created_at) VALUES "
            "('k', 'tokens', :text, jsonb_build_object('data', jsonb_build_object('message', CAST(:text AS text))), "
            "'failed', now(), now())",
            text=HOSTILE[0],
        )
        pages = [client.get(path, headers=OPS) for path in ("/", *(f"/drifts/{drift}" for drift in found))]
    for page in pages:
        assert page.status_code == 200, page.text
        assert len(re.findall("<script", page.text)) == 1
        assert "<img" not in page.text
        assert "\u202e" not in page.text
        assert "&lt;script&gt;alert(1)" in page.text
    engine.dispose()


# Decisions


def test_a_drift_is_accepted_by_its_form_and_the_name_is_kept(
    client: TestClient, connection: Connection, host: Host
) -> None:
    user = credited(host)
    path = f"/drifts/{drift_in_review(host, user)}"
    sign_in(client, connection, "ann")
    page = client.get(path)
    assert "9,900 → 9,400" in page.text
    for _ in range(2):  # a repeated form decides nothing more
        answer = post(client, path, page, choice="accept", note="asked <the> customer")
        assert (answer.status_code, answer.headers["location"]) == (303, path)
    assert decisions(host) == [("accept", None, "ann", "asked <the> customer", 9_400)]
    assert host.counter(user) == 9_400
    done = client.get(path).text
    assert "Decided: accept" in done
    assert "asked &lt;the&gt; customer" in done
    other = post(client, path, page, choice="ignore", note="no")
    assert (other.status_code, "That decision stays" in other.text) == (409, True)
    assert len(decisions(host)) == 1


def test_a_grant_needs_a_reference_and_grants_once(client: TestClient, connection: Connection, host: Host) -> None:
    user = credited(host)
    path = f"/drifts/{drift_in_review(host, user)}"
    sign_in(client, connection)
    page = client.get(path)
    lacking = post(client, path, page, choice="grant", note="pack", reference=" ")
    assert lacking.status_code == 422
    assert "a grant needs one" in lacking.text
    assert 'value="pack"' in lacking.text  # what was typed stays
    assert post(client, path, page, choice="grant", note="pack", reference="tx-1").status_code == 303
    assert host.value("SELECT sum(tokens) FROM trueup.token_grant") == 500
    assert host.counter(user) == 9_900


def test_one_component_is_decided_and_the_others_stay(client: TestClient, connection: Connection, host: Host) -> None:
    user = credited(host)
    host.execute("UPDATE billing_subscription SET tokens_remaining = tokens_remaining + 70 WHERE user_id = :u", u=user)
    reconcile(get_engine(), HostMapping())
    drift = drift_in_review(host, user)
    sign_in(client, connection)
    page = client.get(f"/drifts/{drift}")
    offered = re.findall(r'<option value="(\d+)">', page.text)
    assert offered == ["1", "2"]
    answer = post(client, f"/drifts/{drift}", page, choice="accept", component="1", note="first alone")
    assert answer.status_code == 303, answer.text
    assert [row[:2] for row in decisions(host)] == [("accept", 1)]
    assert drift_in_review(host, user) != drift


@pytest.mark.parametrize(
    "fields",
    [
        {"choice": "delete", "note": "x"},
        {"note": "x"},
        {"choice": "accept", "note": ""},
        {"choice": "accept", "note": "a\x1bb"},
        {"choice": "accept", "note": "x" * 501},
        {"choice": "accept", "note": "x", "component": "-1"},
        {"choice": "accept", "note": "x", "component": "1; DROP"},
    ],
    ids=str,
)
def test_wrong_input_is_refused_in_words_and_writes_nothing(
    client: TestClient, connection: Connection, host: Host, fields: dict[str, str]
) -> None:
    path = f"/drifts/{drift_in_review(host, credited(host))}"
    sign_in(client, connection)
    answer = post(client, path, client.get(path), **fields)
    assert answer.status_code == 422
    assert "Nothing was written." in answer.text
    assert decisions(host) == []


@pytest.mark.parametrize("path", ["/drifts/999", f"/drifts/{2**63}", "/drifts/x", "/login/short"])
def test_an_address_of_nothing_is_a_page_that_says_so(client: TestClient, path: str) -> None:
    answer = client.get(path, headers=OPS)
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("text/html")


Spoil = Callable[[dict[str, str], dict[str, str]], None]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda form, headers: form.pop("form_token"),
        lambda form, headers: form.update(form_token="0" * 64),
        lambda form, headers: form.update(form_token="ü"),
        lambda form, headers: headers.update({"Origin": "https://evil.example"}),
        lambda form, headers: headers.update({"Origin": "null"}),
        lambda form, headers: headers.update({"Sec-Fetch-Site": "cross-site"}),
        lambda form, headers: headers.update({"Sec-Fetch-Site": "same-site"}),
        lambda form, headers: headers.update({"Cookie": f"{COOKIE}=another"}),
    ],
)
@pytest.mark.parametrize("opened", ["session", "token", "local"])
def test_a_form_of_another_site_decides_nothing(
    client_with: MakeClient, connection: Connection, host: Host, spoil: Spoil, opened: str
) -> None:
    local = opened == "local"
    client = client_with(jwt_secret=None, local_page="open") if local else client_with()
    path = f"/drifts/{drift_in_review(host, credited(host))}"
    headers = dict(OPS) if opened == "token" else {}
    if opened == "session":
        sign_in(client, connection)
    form = {"form_token": token_of(client.get(path, headers=headers)), "choice": "accept", "note": "x"}
    right = dict(form)
    spoil(form, headers)
    answer = client.post(path, data=form, headers=headers, follow_redirects=False)
    assert answer.status_code in (401, 403), answer.text
    assert decisions(host) == []
    headers = {**(OPS if opened == "token" else {}), "Origin": "http://127.0.0.1", "Sec-Fetch-Site": "same-origin"}
    assert client.post(path, data=right, headers=headers, follow_redirects=False).status_code == 303


# Faults


def test_without_a_database_the_page_says_so_and_shows_no_figures(
    client_with: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_with()
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://trueup@127.0.0.1:1/gone")
    dispose_engine()
    get_settings.cache_clear()
    answer = client.get("/", headers=OPS)
    assert (answer.status_code, "PostgreSQL does not answer" in answer.text) == (503, True)
    assert "127.0.0.1:1" not in answer.text
    client.cookies.set(COOKIE, "a session, perhaps")
    stranger = client.get("/")
    assert (stranger.status_code, "PostgreSQL does not answer" in stranger.text) == (503, True)
    assert stranger.headers["retry-after"] == "5"


def test_a_404_points_to_the_documentation_which_lists_every_address(client: TestClient) -> None:
    missing = client.get("/api/nowhere")
    assert (missing.status_code, missing.json()["error"]) == (
        404,
        "No resource has this address. The page /docs lists the addresses",
    )
    docs: httpx.Response = client.get("/docs")
    assert docs.status_code == 200
    for path in client.get("/openapi.json").json()["paths"]:
        assert path in docs.text
    assert len(docs.content) < 100_000
