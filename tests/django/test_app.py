"""The app `trueup.django`: the mapping follows from a project's models, and wrong settings become findings."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

POSTGRESQL = "postgresql+psycopg://ann:p%40ss%2Fword%231@db.internal:5433/shop?sslmode=require"


@pytest.fixture(scope="module")
def cases() -> dict[str, Any]:
    """What `shop_cases.py` prints. It runs in a process of its own, because a process has one Django project."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRUEUP_")}
    command = [sys.executable, "-m", "tests.django.shop_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_tables_columns_and_types_follow_from_the_models(cases: dict[str, Any]) -> None:
    host = cases["right"]["host"]
    assert cases["right"]["findings"] == []
    assert (host["user_id_type"], host["usage_log_id_type"]) == ("bigint", "uuid")
    assert host["user"]["table"] == "auth_user"
    assert (host["token_plan"]["table"], host["token_plan"]["tokens_included"]) == ("shop_pack", "token_count")
    assert host["full_plan"]["table"] is None
    log = host["usage_log"]
    assert (log["table"], log["id"], log["user_id"], log["total_tokens"]) == (
        "shop_modelcall",
        "uid",
        "whose",
        "tokens_used",
    )
    assert log["prompt_tokens"] == {"value": 0}


def test_a_quoted_schema_and_the_better_named_of_two_keys_are_taken(cases: dict[str, Any]) -> None:
    subscription = cases["right"]["host"]["subscription"]
    assert (subscription["table"], subscription["user_id"]) == ("sales.membership", "owner_id")


def test_servers_are_those_of_the_project_unless_it_names_others(cases: dict[str, Any]) -> None:
    assert cases["right"]["database_url"] == POSTGRESQL
    assert cases["right"]["broker_url"] == "redis://broker:6379/3"
    assert cases["own url"]["database_url"] == "postgresql+psycopg://worker@db/app"
    assert "host=%2Fvar%2Frun%2Fpostgresql" in cases["socket"]


def test_payments_and_decrements_are_mapped_with_the_word_for_paid(cases: dict[str, Any]) -> None:
    host = cases["all nouns"]["host"]
    assert (host["payment"]["status"], host["payment"]["completed_status"]) == ("state", "PAID")
    assert (host["token_usage"]["table"], host["token_usage"]["subscription_id"]) == ("shop_deduction", "membership_id")


def test_the_project_names_fields_as_its_models_do(cases: dict[str, Any]) -> None:
    log = cases["named fields"]["host"]["usage_log"]
    assert (log["section"], log["success"]) == ("note", {"value": True})
    named = cases["two keys, one named"]
    assert (named["findings"], named["host"]["subscription"]["user_id"]) == ([], "to_id")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no log", "TRUEUP['USAGE_LOG'] is missing"),
        ("no such model", "'shop.Nothing', which is no model"),
        ("no label", "is 7, which is no model"),
        ("misspelt", "Did you mean USAGE_LOG?"),
        ("no such field", "['totals'] is unknown"),
        ("a doubtful counter", "'amount_of_something' is only a guess"),
        ("a child's key", "name its parent (shop.ModelCall)"),
        ("two keys to the user", "several keys for user_id: giver_id, to_id"),
        ("several databases", "in several databases: default, second"),
        ("no such database", "Use one of default, second, small"),
        ("another engine", "is sqlite. trueup needs PostgreSQL"),
        ("no dict", "TRUEUP is no dict"),
    ],
)
def test_what_is_wrong_or_in_doubt_is_one_finding_and_stops_trueup(
    cases: dict[str, Any], case: str, words: str
) -> None:
    [finding] = cases[case]["findings"]
    assert words in finding
    assert finding in cases[case]["error"]


def test_a_wrong_setting_of_trueups_own_is_named(cases: dict[str, Any]) -> None:
    assert "hold_ttl_seconds" in cases["a wrong setting"]["error"]
