"""All views show the same figures of one user, in the specification's fields."""

import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from tests.api.conftest import MakeClient
from tests.support.api import bearer
from tests.support.host import START, Host
from tests.support.round_trips import round_trips
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.errors import SettingsError
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.settings.settings import get_settings

pytestmark = pytest.mark.dated

VIEWS = (
    "/api/accounts/overview",
    "/api/accounts/profile",
    "/api/billing/overview",
    "/api/billing/subscription",
    "/api/billing/plans",
)
AI_USAGE = {
    "total_tokens_consumed",
    "original_tokens_included",
    "actual_tokens_remaining",
    "tokens_remaining_in_db",
}


def get(client: TestClient, path: str, user: object) -> dict[str, Any]:
    answer = client.get(path, headers=bearer(user))
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def figures_of(body: dict[str, Any]) -> dict[str, int]:
    """Return every token figure in an answer by its path, at any depth."""
    found = {}
    for name, value in body.items():
        if isinstance(value, dict):
            found |= {f"{name}.{inner}": figure for inner, figure in figures_of(value).items()}
        elif "tokens" in name:
            found[name] = value
    return found


def test_the_subscription_has_the_specifications_fields(client: TestClient, host: Host) -> None:
    user = host.subscriber(10_000, counter=8450)
    host.log(user, 1500)
    body = get(client, "/api/billing/subscription", user)
    assert body["tokens_remaining"] == 8500
    assert body["ai_usage"] == {
        "total_tokens_consumed": 1500,
        "original_tokens_included": 10_000,
        "actual_tokens_remaining": 8500,
        "tokens_remaining_in_db": 8450,
    }
    assert (body["is_active"], body["start_date"], body["end_date"]) == (True, "2024-11-01T12:00:00Z", None)
    assert body["plan"] | {"id": 0} == {
        "kind": "token",
        "id": 0,
        "name": "token 10000",
        "tokens_included": 10_000,
        "duration_days": None,
        "is_active": True,
    }


def test_all_views_show_the_same_figures(client: TestClient, host: Host) -> None:
    user = host.subscriber(10_000, kind="full", end=datetime.now(UTC) + timedelta(days=15, hours=1), counter=77)
    host.log(user, 3456)
    assert get_accurate_tokens_remaining(user) == (10_000, 3456, 6544)

    account = get(client, "/api/accounts/overview", user)
    profile = get(client, "/api/accounts/profile", user)
    billing = get(client, "/api/billing/overview", user)
    current = get(client, "/api/billing/subscription", user)
    (own,) = [plan for plan in get(client, "/api/billing/plans", user)["plans"] if plan["is_current"]]

    assert account["current_subscription"] == billing["current_subscription"] == current
    assert account["current_subscription"]["tokens_remaining"] == 6544
    assert set(current["ai_usage"]) == AI_USAGE
    assert own["ai_usage"] == current["ai_usage"]
    assert {name: account[name] for name in profile} == profile
    assert (profile["token_usage_remaining"], profile["subscription_remaining"]) == (65.4, 50.0)
    assert current["days_remaining"] == 15
    assert (billing["ai_tokens_total"], billing["original_tokens_included"], billing["actual_tokens_remaining"]) == (
        3456,
        10_000,
        6544,
    )
    assert current["ai_usage"]["tokens_remaining_in_db"] == 77


def test_a_null_counter_is_null_and_refunds_never_exceed_100_percent(client: TestClient, host: Host) -> None:
    user = host.subscriber(1000, counter=None)
    host.log(user, -200)
    body = get(client, "/api/accounts/overview", user)
    assert body["current_subscription"]["ai_usage"]["tokens_remaining_in_db"] is None
    assert body["token_usage_remaining"] == 100.0


def test_an_overdrawn_budget_shows_zero_remaining(client: TestClient, host: Host) -> None:
    user = host.subscriber(1000)
    host.log(user, 1300)
    body = get(client, "/api/billing/overview", user)
    assert (body["ai_tokens_total"], body["actual_tokens_remaining"]) == (1300, 0)
    assert get(client, "/api/accounts/profile", user)["token_usage_remaining"] == 0.0


def test_without_a_subscription_the_figures_are_zero(client: TestClient, host: Host) -> None:
    user = host.user()
    account = get(client, "/api/accounts/overview", user)
    assert (account["current_subscription"], account["subscription_remaining"]) == (None, 0.0)
    assert account["username"] == f"user{user}"
    assert get(client, "/api/billing/overview", user) == {
        "current_subscription": None,
        "ai_tokens_total": 0,
        "original_tokens_included": 0,
        "actual_tokens_remaining": 0,
    }
    missing = client.get("/api/billing/subscription", headers=bearer(user))
    assert (missing.status_code, missing.json()["error_code"]) == (404, "no_subscription")
    assert not any(plan["is_current"] for plan in get(client, "/api/billing/plans", user)["plans"])


def test_the_plans_are_those_on_sale_and_the_users_own_even_if_retired(client: TestClient, host: Host) -> None:
    sold, full = host.plan(500), host.plan(9000, kind="full")
    retired = host.plan(400)
    user = host.subscriber(700)
    host.execute("UPDATE billing_tokenplan SET is_active = false WHERE id = :id OR tokens_included = 700", id=retired)
    host.log(user, 70)
    own, *others = get(client, "/api/billing/plans", user)["plans"]
    assert (own["tokens_included"], own["is_current"], own["is_active"]) == (700, True, False)
    assert own["ai_usage"]["actual_tokens_remaining"] == 630
    assert [(plan["kind"], plan["id"], plan["is_current"], plan["ai_usage"]) for plan in others] == [
        ("token", sold, False, None),
        ("full", full, False, None),
    ]
    assert others[1]["duration_days"] == 30


def test_of_two_plans_the_token_plan_sets_the_tokens_and_the_full_plan_the_duration(
    client: TestClient, host: Host
) -> None:
    user = host.subscriber(700, end=datetime.now(UTC) + timedelta(days=6, hours=1))
    full = host.plan(9000, kind="full")
    host.execute("UPDATE billing_subscription SET full_plan_id = :full WHERE user_id = :user", full=full, user=user)
    plans = get(client, "/api/billing/plans", user)["plans"]
    assert [(plan["kind"], plan["is_current"], plan["ai_usage"] is not None) for plan in plans] == [
        ("token", True, True),
        ("full", True, False),
    ]
    assert get(client, "/api/accounts/profile", user)["subscription_remaining"] == 20.0
    assert get(client, "/api/billing/overview", user)["original_tokens_included"] == 700


@pytest.mark.parametrize(
    ("start", "end", "percent"),
    [
        (timedelta(days=-10), timedelta(days=10, hours=1), 50.0),
        (timedelta(days=-10), None, 100.0),
        (timedelta(days=-10), timedelta(days=-1), 0.0),
        (timedelta(days=20), timedelta(days=10), 0.0),
        (timedelta(days=1), timedelta(days=11, hours=1), 100.0),
    ],
    ids=["in the middle", "unlimited", "expired", "ends before it begins", "begins later"],
)
def test_the_remaining_share_of_a_subscription_counts_days(
    client: TestClient, host: Host, start: timedelta, end: timedelta | None, percent: float
) -> None:
    now = datetime.now(UTC)
    user = host.subscriber(start=now + start, end=None if end is None else now + end)
    assert get(client, "/api/accounts/profile", user)["subscription_remaining"] == pytest.approx(percent, abs=0.2)


def test_a_subscription_without_a_start_date_is_shown(client: TestClient, host: Host) -> None:
    user = host.subscriber(end=datetime.now(UTC) + timedelta(days=3))
    host.execute("UPDATE billing_subscription SET start_date = '-infinity' WHERE user_id = :user", user=user)
    body = get(client, "/api/accounts/overview", user)
    assert body["current_subscription"]["start_date"] is None
    assert 0 <= body["subscription_remaining"] <= 100


@pytest.mark.parametrize("path", VIEWS)
def test_a_deleted_user_is_refused(client: TestClient, host: Host, path: str) -> None:
    answer = client.get(path, headers=bearer(987_654))
    assert (answer.status_code, answer.json()["error_code"]) == (401, "not_authenticated")


@pytest.mark.parametrize("path", VIEWS)
def test_each_view_shows_the_tokens_user_only(client: TestClient, host: Host, path: str) -> None:
    mine, other = host.subscriber(1111, counter=1), host.subscriber(2222, counter=2)
    host.log(other, 333)
    seen = get(client, path, mine)
    assert all(figure not in (2222, 333, 1889) for name, figure in figures_of(seen).items())
    for way in ({"params": {"user_id": other}}, {"headers": bearer(mine) | {"X-User-Id": str(other)}}):
        assert client.get(path, **({"headers": bearer(mine)} | way)).json() == seen  # type: ignore[arg-type]


@pytest.mark.parametrize("path", VIEWS)
def test_a_view_costs_one_round_trip(client: TestClient, host: Host, tmp_path: Path, path: str) -> None:
    user = host.subscriber()
    get(client, path, user)  # the first request connects
    with round_trips(tmp_path / "trace") as seen:
        get(client, path, user)
    assert seen == ["I"]  # one round trip; "I": no transaction is open after it


@pytest.mark.parametrize("kind", ["uuid", "text"])
def test_user_ids_have_the_type_of_the_mapping(
    empty_database: str, client_with: MakeClient, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    user = str(uuid.UUID(int=7)) if kind == "uuid" else "user|7 é"
    monkeypatch.setenv("TRUEUP_DATABASE_URL", empty_database)
    monkeypatch.setenv("TRUEUP_HOST__USER_ID_TYPE", kind)
    get_settings.cache_clear()
    mapping = HostMapping(user_id_type=kind)  # type: ignore[arg-type]
    engine = create_engine(empty_database, poolclass=NullPool)
    with engine.begin() as connection:
        install(connection, mapping, with_host_tables=True)
        connection.execute(
            text(
                """
                WITH the_user AS (INSERT INTO accounts_user (id, username, email) VALUES (:user, 'u', '')),
                     the_plan AS (INSERT INTO billing_tokenplan (id, name, tokens_included) VALUES (1, 'p', 100))
                INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining)
                VALUES (1, :user, 1, :start, 100)
                """
            ),
            {"user": user, "start": START},
        )
    engine.dispose()
    client = client_with()
    body = get(client, "/api/accounts/overview", user)
    assert body["id"] == user
    assert body["current_subscription"]["tokens_remaining"] == 100
    assert client.get("/api/accounts/overview", headers=bearer(7)).status_code == 401


def test_a_missing_column_of_the_views_is_named_at_start(
    host: Host, client_with: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(1_000, kind="full")
    host.execute("ALTER TABLE accounts_user DROP email; ALTER TABLE billing_fullplan DROP duration_days")
    with pytest.raises(SettingsError, match=r"no column accounts_user\.email, billing_fullplan\.duration_days, which"):
        client_with()
    monkeypatch.setenv("TRUEUP_HOST__USER__EMAIL", '{"value": "none"}')
    monkeypatch.setenv("TRUEUP_HOST__FULL_PLAN__DURATION_DAYS", '{"value": 90}')
    client = client_with()
    assert get(client, "/api/accounts/profile", user)["email"] == "none"
    assert get(client, "/api/billing/subscription", user)["plan"]["duration_days"] == 90


def test_without_a_user_table_every_subscriber_is_a_user(
    host: Host, client_with: MakeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    user, other = host.subscriber(1_000), host.user()
    monkeypatch.setenv("TRUEUP_HOST__USER", "false")
    client = client_with()
    body = get(client, "/api/accounts/overview", user)
    assert (body["username"], body["email"]) == (None, None)
    assert body["current_subscription"]["tokens_remaining"] == 1_000
    assert client.get("/api/accounts/overview", headers=bearer(other)).status_code == 401
