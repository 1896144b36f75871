"""`trueup tokens show` and `check`."""

from datetime import timedelta

import pytest

from tests.cli.conftest import trueup, trueup_json
from tests.support.host import START, Host
from tests.support.work import hold_tokens

UNKNOWN_USER = 999_999


def test_show_prints_consumed_held_and_remaining_tokens(host: Host, connection: object) -> None:
    user = host.subscriber(10_000)
    host.log(user, 2_500)
    hold_tokens(connection, user, 1_000)  # type: ignore[arg-type]
    shown = trueup_json("tokens", "show", user)
    assert {name: shown[name] for name in ("original", "consumed", "remaining", "held", "available")} == {
        "original": 10_000,
        "consumed": 2_500,
        "remaining": 7_500,
        "held": 1_000,
        "available": 6_500,
    }
    assert (shown["counter"], shown["drift"]) == (10_000, 2_500)
    assert (shown["user"], shown["window_start"]) == (str(user), START.isoformat())


def test_show_is_readable_for_people(host: Host) -> None:
    user = host.subscriber(10_000)
    host.log(user, 2_500)
    lines = dict(line.split(maxsplit=1) for line in trueup("tokens", "show", user).stdout.splitlines())
    assert lines["remaining"] == "7,500"
    assert lines["drift"] == "2,500"
    assert lines["active"] == "yes"


@pytest.mark.parametrize("known", [True, False], ids=["a user without subscription", "an unknown user"])
def test_show_says_so_when_there_is_no_subscription(host: Host, known: bool) -> None:
    user = host.user() if known else UNKNOWN_USER
    result = trueup("tokens", "show", user, code=1)
    assert result.stdout == ""
    assert f"{user} has no subscription" in result.stderr


def test_check_allows_work_that_the_balance_covers(host: Host) -> None:
    user = host.subscriber(1_000)
    assert trueup("tokens", "check", user, "--tokens", 1_000).stdout.startswith("verdict    allowed\n")
    assert trueup_json("tokens", "check", user, "--tokens", 1_000)["has_access"] is True


def test_check_reserves_nothing(host: Host) -> None:
    user = host.subscriber(1_000)
    for _ in range(2):
        assert trueup_json("tokens", "check", user, "--tokens", 1_000)["tokens_available"] == 1_000


def denied_user(host: Host, reason: str) -> int:
    match reason:
        case "no_subscription":
            return host.user()
        case "subscription_deactivated":
            return host.subscriber(active=False)
        case "subscription_expired":
            return host.subscriber(end=START + timedelta(minutes=1))
        case "no_tokens_remaining":
            user = host.subscriber(1_000)
            host.log(user, 1_000)
            return user
        case _:
            return host.subscriber(1_499)


@pytest.mark.parametrize(
    "reason",
    [
        "no_subscription",
        "subscription_deactivated",
        "subscription_expired",
        "no_tokens_remaining",
        "insufficient_tokens",
    ],
)
def test_a_denial_ends_with_code_3_and_its_reason(host: Host, reason: str) -> None:
    user = denied_user(host, reason)
    command = ("tokens", "check", user, "--tokens", 1_500, "--feature", "Summaries")
    assert f"denied: {reason}\n" in trueup(*command, code=3).stdout
    access = trueup_json(*command, code=3)
    assert (access["has_access"], access["reason"]) == (False, reason)


def test_a_denial_names_the_feature_and_the_figures(host: Host) -> None:
    user = host.subscriber(1_499)
    output = trueup("tokens", "check", user, "--tokens", 1_500, "--feature", "Summaries", code=3).stdout
    assert "Insufficient tokens for Summaries: 1500 needed, 1499 available" in output


@pytest.mark.parametrize("user", ["ann", "1.5", "1_0", "", "٣", "99999999999999999999"])
@pytest.mark.parametrize("command", ["show", "check"])
def test_a_malformed_user_id_is_wrong_usage(database: str, command: str, user: str) -> None:
    result = trueup("tokens", command, user, code=2)
    assert "user id" in result.stderr or "out of range" in result.stderr


@pytest.mark.parametrize("tokens", ["-1", "1.5", "many", "", "99999999999999999999"])
def test_a_malformed_count_of_tokens_is_wrong_usage(database: str, tokens: str) -> None:
    result = trueup("tokens", "check", 1, "--tokens", tokens, code=2)
    assert "Invalid value for '--tokens'" in result.stderr
