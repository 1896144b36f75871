"""The specification's functions, called as its documents call them."""

import uuid
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import psycopg2
import pytest
from sqlalchemy import Connection
from sqlalchemy.orm import Session

from tests.support.host import Host
from tests.support.waiting import wait_for
from trueup.billing.decorators import check_tokens_for_function
from trueup.billing.utils import check_ai_access_for_user, get_accurate_tokens_remaining
from trueup.database.engine import dispose_engine
from trueup.errors import InvalidInputError, NotInstalledError, ServiceUnavailableError
from trueup.host.mapping import HostMapping
from trueup.install.rights import RoleNames, grants_sql
from trueup.settings.settings import get_settings

KEYS = {
    "has_access",
    "message",
    "tokens_remaining",
    "original_tokens",
    "consumed_tokens",
    "days_remaining",
    "tokens_held",
    "tokens_available",
}

FACES: list[Callable[[Any], Any]] = [
    get_accurate_tokens_remaining,
    lambda user: check_ai_access_for_user(user, 10, "Test"),
    check_tokens_for_function,
]


def test_the_three_figures_come_from_the_log_and_never_from_the_counter(host: Host) -> None:
    user = host.subscriber(10_000, counter=77)
    host.log(user, 1_500)
    assert get_accurate_tokens_remaining(user) == (10_000, 1_500, 8_500)
    host.log(user, 9_000)
    assert get_accurate_tokens_remaining(user) == (10_000, 10_500, 0)


@pytest.mark.parametrize("wrap", [str, lambda user: SimpleNamespace(pk=user), lambda user: SimpleNamespace(id=user)])
def test_a_user_is_an_id_or_an_object(host: Host, wrap: Callable[[int], Any]) -> None:
    user = host.subscriber(2_000)
    assert get_accurate_tokens_remaining(wrap(user)) == (2_000, 0, 2_000)
    assert check_ai_access_for_user(wrap(user), 2_000, "Test")["has_access"]
    assert not check_ai_access_for_user(wrap(user), 2_001, "Test")["has_access"]


@pytest.mark.parametrize("user", [None, SimpleNamespace(pk=None), SimpleNamespace(id=None), 424_242])
def test_an_anonymous_or_unknown_user_has_nothing(host: Host, user: Any) -> None:
    assert get_accurate_tokens_remaining(user) == (0, 0, 0)
    access = check_ai_access_for_user(user, 0, "Test")
    assert set(access) == KEYS | {"reason"}
    assert (access["has_access"], access["reason"]) == (False, "no_subscription")


def test_the_answer_has_exactly_these_keys_and_a_reason_only_when_denied(host: Host) -> None:
    user = host.subscriber(1_499)
    assert set(check_ai_access_for_user(user, 1_499, "Test")) == KEYS
    denied = check_tokens_for_function(user)  # 1,500 by default
    assert set(denied) == KEYS | {"reason"}
    assert denied["message"] == "Insufficient tokens for AI Feature: 1500 needed, 1499 available"


@pytest.mark.parametrize("estimate", [-1, True, 1.5, "10", None])
def test_a_malformed_estimate_is_a_value_error_for_any_user(host: Host, estimate: Any) -> None:
    for user in (host.subscriber(), None):
        with pytest.raises(ValueError, match="estimated_tokens"):
            check_ai_access_for_user(user, estimate, "Test")
        with pytest.raises(ValueError, match="estimated_tokens"):
            check_tokens_for_function(user, estimate)


@pytest.mark.parametrize("face", FACES)
def test_a_malformed_user_is_refused(database: str, face: Callable[[Any], Any]) -> None:
    for user in ("five", object(), 2**63, uuid.uuid4()):
        with pytest.raises(InvalidInputError, match="user_id"):
            face(user)


@pytest.mark.parametrize("face", FACES)
def test_an_unavailable_database_is_an_error_and_never_zeros(
    host: Host, monkeypatch: pytest.MonkeyPatch, face: Callable[[Any], Any]
) -> None:
    user = host.subscriber()
    monkeypatch.setenv("TRUEUP_DATABASE_URL", "postgresql://user:s3cret@127.0.0.1:1/x")
    get_settings.cache_clear()
    dispose_engine()
    with pytest.raises(ServiceUnavailableError, match=r"127\.0\.0\.1:1/x does not answer") as down:
        face(user)
    assert "s3cret" not in str(down.value)


@pytest.mark.parametrize("face", FACES)
def test_the_error_for_a_database_without_trueup_names_the_setup_command(
    empty_database: str, face: Callable[[Any], Any]
) -> None:
    with pytest.raises(NotInstalledError, match="trueup db attach"):
        face(1)


@pytest.mark.parametrize("face", FACES)
def test_a_dead_connection_in_the_pool_causes_no_error(host: Host, face: Callable[[Any], Any]) -> None:
    user = host.subscriber(10_000)
    first = face(user)
    host.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trueup'")
    wait_for(lambda: host.value("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'trueup'") == 0)
    assert face(user) == first


SUBSCRIBE = """
    INSERT INTO billing_subscription (user_id, token_plan_id, start_date, tokens_remaining) VALUES ({}, {}, now(), 700)
"""


@pytest.mark.parametrize("kind", ["sqlalchemy", "session", "psycopg"])
def test_the_hosts_connection_sees_the_subscription_that_its_transaction_makes(host: Host, kind: str) -> None:
    user, plan = host.user(), host.plan(700)
    with host.engine.connect() as outer:
        outer.exec_driver_sql("SET LOCAL timezone = 'Asia/Tehran'")
        outer.exec_driver_sql("SET LOCAL search_path = public")
        outer.exec_driver_sql(SUBSCRIBE.format(user, plan))
        driver = outer.connection.driver_connection
        given = {"sqlalchemy": outer, "session": Session(outer), "psycopg": driver}[kind]
        access = check_ai_access_for_user(user, 700, "Test", connection=given)
        assert (access["has_access"], access["original_tokens"], set(access)) == (True, 700, KEYS)
        assert not check_ai_access_for_user(user, 701, "Test", connection=given)["has_access"]
        # Other connections do not see it yet, and the host's settings are as before.
        assert check_ai_access_for_user(user, 1, "Test")["reason"] == "no_subscription"
        names = ("timezone", "search_path", "row_security")
        shown = [outer.exec_driver_sql(f"SHOW {name}").scalar() for name in names]
        assert shown == ["Asia/Tehran", "public", "on"]
        outer.rollback()
    assert check_ai_access_for_user(user, 1, "Test")["reason"] == "no_subscription"


def test_a_connection_of_psycopg2_and_a_role_that_only_reads_are_enough(host: Host, connection: Connection) -> None:
    user, plan, url = host.user(), host.plan(700), host.engine.url
    roles = RoleNames(migrate=f"m_{url.database}", worker=f"w_{url.database}", readonly=f"r_{url.database}")
    with host.engine.begin() as setup:
        for statement in grants_sql(setup, HostMapping(), roles):
            setup.exec_driver_sql(statement.replace("%", "%%"))
    of_host = psycopg2.connect(
        dbname=url.database,
        user=url.username,
        host=url.query.get("host", url.host),
        port=url.query.get("port", url.port),
    )
    try:
        with of_host.cursor() as cursor:
            cursor.execute(SUBSCRIBE.format(user, plan))
            cursor.execute(f"SET LOCAL ROLE {roles.readonly}")
        assert check_ai_access_for_user(user, 700, "Test", connection=of_host)["has_access"]
    finally:
        of_host.close()
        for role in (roles.migrate, roles.worker, roles.readonly):
            host.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role} CASCADE; DROP ROLE {role}")


def test_what_is_no_connection_is_refused_by_name() -> None:
    with pytest.raises(InvalidInputError, match="connection: str is no open database connection"):
        check_ai_access_for_user(1, 1, "Test", connection="postgresql://")
