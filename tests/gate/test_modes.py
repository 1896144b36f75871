"""Modes of the gate: which denied tasks a mode admits, which denials it records, and that the books stay true."""

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.sessions import run_at_once
from tests.support.work import balance, charge_tokens, hold_tokens
from trueup.billing.utils import check_ai_access_for_user
from trueup.billing.view_guard import token_gate
from trueup.errors import HoldOvertakenError, InvalidInputError, TokensDenied
from trueup.gate.decision import check_gate
from trueup.gate.holds import close_hold
from trueup.gate.modes import (
    list_changes,
    list_denied_tasks,
    list_modes,
    list_observed_denials,
    mode_of,
    overrides_denial,
    prune_denials,
    set_mode,
)
from trueup.gate.provider_calls import begin_call, extend_hold
from trueup.monitoring.status import read_status
from trueup.settings.settings import get_settings

FEATURE = "Test"  # of tests.support.work


def mode(connection: Connection, mode: str | None, feature: str = FEATURE) -> str | None:
    return set_mode(connection, feature, mode, changed_by="me", note="why")


def denials(host: Host) -> list[Any]:
    return [
        tuple(row)
        for row in host.execute("SELECT feature_name, reason, tokens FROM trueup.observed_denial ORDER BY id")
    ]


def subscribe(host: Host, user: int, tokens: int) -> None:
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining, is_active) "
        "VALUES (:user, :user, :plan, now() - interval '1 day', :tokens, true)",
        user=user,
        plan=host.plan(tokens),
        tokens=tokens,
    )


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    yield monkeypatch
    monkeypatch.undo()
    get_settings.cache_clear()


def test_observe_mode_admits_a_task_beyond_the_budget_and_records_the_denial(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(1_000)
    mode(connection, "observe")
    hold = hold_tokens(connection, user, 1_500)
    assert (hold.overridden, hold.tokens_left) == ("insufficient_tokens", 1_500)
    assert denials(host) == [(FEATURE, "insufficient_tokens", 1_500)]
    charge_tokens(connection, hold, 1_400)
    assert balance(host, user) == (1_400, 100)
    close_hold(connection, hold)
    again = hold_tokens(connection, user, 10)
    assert again.overridden == "no_tokens_remaining"
    assert_true(host)


@pytest.mark.parametrize(("mode_now", "recorded"), [("observe", 1), ("off", 0)])
def test_a_task_whose_attempt_died_in_a_call_continues_beyond_the_budget_too(
    host: Host, connection: Connection, mode_now: str, recorded: int
) -> None:
    user = host.subscriber(1_000)
    mode(connection, mode_now)
    first = hold_tokens(connection, user, 1_500, task="t")
    begin_call(connection, first, call_key="1", max_tokens=1_500, lease_seconds=0, ttl_seconds=600)
    second = hold_tokens(connection, user, 1_500, task="t")
    assert (second.tokens_left, balance(host, user)) == (1_500, (0, 3_000))
    assert len(denials(host)) == recorded
    charge_tokens(connection, second, 1_500, key="2")
    assert charge_tokens(connection, first, 1_500).tokens_over == 0
    assert_true(host)


def test_an_admitted_task_leaves_no_record_of_a_denial(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    mode(connection, "observe")
    assert hold_tokens(connection, user, 1_000).overridden is None
    assert denials(host) == []


def test_off_mode_admits_a_task_and_records_nothing(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000, active=False)
    mode(connection, "off")
    assert hold_tokens(connection, user, 1_500).overridden == "subscription_deactivated"
    assert denials(host) == []
    assert_true(host)


def test_a_features_own_mode_precedes_that_of_every_feature_and_both_precede_the_settings(
    host: Host, connection: Connection, settings: pytest.MonkeyPatch
) -> None:
    user = host.subscriber(1_000)
    settings.setenv("TRUEUP_GATE__DEFAULT_MODE", "off")
    settings.setenv("TRUEUP_GATE__MODES", '{"Test": "observe"}')
    get_settings.cache_clear()
    hold_tokens(connection, user, 1_500)
    assert len(denials(host)) == 1
    mode(connection, "enforce", "*")
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 1_500)
    mode(connection, "off")
    assert hold_tokens(connection, user, 1_500).overridden
    mode(connection, None)
    with pytest.raises(TokensDenied):
        hold_tokens(connection, user, 1_500)
    assert len(denials(host)) == 1


def test_observe_mode_admits_a_user_without_a_subscription_with_true_books(host: Host, connection: Connection) -> None:
    user = host.user()
    mode(connection, "observe")
    hold = hold_tokens(connection, user, 300)
    assert (hold.overridden, hold.tokens_left) == ("no_subscription", 300)
    assert begin_call(connection, hold, call_key="1", max_tokens=300, lease_seconds=30, ttl_seconds=60) is None
    charge_tokens(connection, hold, 200)
    assert_true(host)
    subscribe(host, user, 1_000)
    second = hold_tokens(connection, user, 500)
    assert second.overridden is None
    assert balance(host, user) == (200, 600)
    close_hold(connection, hold)
    close_hold(connection, second)
    assert balance(host, user) == (200, 0)
    assert_true(host)


def test_an_extension_obeys_the_mode_too(host: Host, connection: Connection) -> None:
    user = host.subscriber(1_000)
    hold = hold_tokens(connection, user, 800)
    assert extend_hold(connection, hold, 500) == ("insufficient_tokens", 800)
    mode(connection, "observe")
    assert extend_hold(connection, hold, 500) == (None, 1_300)
    assert denials(host) == [(FEATURE, "insufficient_tokens", 500)]
    assert_true(host)


@pytest.mark.parametrize("end", ["closed", "taken over", "open for a slow call", "replayed"])
def test_an_extension_that_the_hold_cannot_get_is_no_denial(host: Host, connection: Connection, end: str) -> None:
    user = host.subscriber(1_000)
    first = hold_tokens(connection, user, 100, task="t")
    begin_call(connection, first, call_key="1", max_tokens=50, lease_seconds=0, ttl_seconds=600)
    # Open holds of each attempt number: of the user's other tasks, and of other users' tasks with this id.
    for other, task, attempts in (
        (user, "u", 1),
        (user, "v", 2),
        (host.subscriber(), "t", 1),
        (host.subscriber(), "t", 2),
    ):
        for _ in range(attempts):
            hold_tokens(connection, other, 100, task=task)
    mode(connection, "observe")
    if end in ("closed", "replayed"):
        close_hold(connection, first, completed=end == "replayed")
    hold = first if end == "closed" else hold_tokens(connection, user, 100, task="t")
    if end == "open for a slow call":
        assert close_hold(connection, hold) == "open"
    if end == "replayed":
        assert extend_hold(connection, hold, 5_000) == (None, 0)
    else:
        with pytest.raises(HoldOvertakenError):
            extend_hold(connection, first if end == "taken over" else hold, 5_000)
    assert list_denied_tasks(connection) == []
    assert_true(host)


def test_a_redelivery_of_a_task_that_observe_mode_admitted_is_not_recorded_again(
    host: Host, connection: Connection
) -> None:
    user = host.subscriber(100)
    mode(connection, "observe")
    hold_tokens(connection, user, 500, task="t")
    again = hold_tokens(connection, user, 500, task="t", retries=1)
    assert (again.reattached, again.tokens_left, len(denials(host))) == (True, 500, 1)


@pytest.mark.parametrize(
    ("set_to", "passes", "recorded"), [("enforce", False, 0), ("observe", True, 1), ("off", True, 0)]
)
def test_a_check_without_a_hold_obeys_the_mode(
    host: Host, connection: Connection, set_to: str, passes: bool, recorded: int
) -> None:
    user = host.subscriber(100)
    mode(connection, set_to)
    denied = {"feature_name": FEATURE, "reason": "insufficient_tokens", "tokens": 500}
    assert overrides_denial(connection, user, **denied) is passes
    assert len(denials(host)) == recorded
    assert [(one.reason, one.overridden) for one in list_denied_tasks(connection)] == (
        [] if set_to == "off" else [("insufficient_tokens", recorded)]
    )


def test_a_guarded_view_that_denies_is_counted_and_a_plain_check_is_not(host: Host, connection: Connection) -> None:
    user = host.subscriber(100)
    assert not check_ai_access_for_user(user, 500, FEATURE)["has_access"]
    assert list_denied_tasks(connection) == []
    refusal = token_gate(500, FEATURE).refusal(user)
    assert refusal is not None
    assert refusal.status == 402
    [denied] = list_denied_tasks(connection)
    assert (denied.reason, denied.times, denied.tokens, denied.users) == ("insufficient_tokens", 1, 500, 1)


def test_each_change_is_recorded_once(host: Host, connection: Connection) -> None:
    assert [mode(connection, m) for m in ("observe", "observe", "enforce", None, None)] == [
        None,
        "observe",
        "observe",
        "enforce",
        None,
    ]
    changes = [(c.mode_before, c.mode, c.changed_by, c.note) for c in reversed(list_changes(connection))]
    assert changes == [
        (None, "observe", "me", "why"),
        ("observe", "enforce", "me", "why"),
        ("enforce", None, "me", "why"),
    ]


def test_each_of_several_concurrent_mode_changes_records_the_mode_that_it_replaced(host: Host) -> None:
    def change(to: str) -> None:
        with host.engine.begin() as connection:
            mode(connection, to)

    run_at_once([lambda to=to: change(to) for to in ("observe", "enforce", "off", "observe", "enforce", "off")])  # type: ignore[misc]
    changes = host.execute("SELECT mode_before, mode FROM trueup.gate_mode_change ORDER BY id").all()
    assert [before for before, _ in changes] == [None, *(after for _, after in changes[:-1])]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "enforced"}, "mode: 'enforced' is unknown. Use one of enforce, observe, off"),
        ({"feature_name": " "}, "feature: '' can't be stored. Give a text"),
        ({"note": ""}, "note: '' can't be stored. Give a text"),
        ({"changed_by": "\x00"}, "by: .* can't be stored. Give a text"),
    ],
)
def test_a_malformed_change_is_refused(connection: Connection, change: dict[str, str], message: str) -> None:
    values = {"feature_name": FEATURE, "mode": "observe", "changed_by": "me", "note": "why"} | change
    with pytest.raises(InvalidInputError, match=message):
        set_mode(connection, values.pop("feature_name"), values.pop("mode"), **values)
    assert list_changes(connection) == []


def test_modes_and_denials_are_listed_with_the_tokens_that_the_tasks_asked_for(
    host: Host, connection: Connection
) -> None:
    first, second = host.subscriber(100), host.subscriber(100)
    mode(connection, "observe")
    for user in (first, first, second):
        hold_tokens(connection, user, 500)
    modes = {m.feature_name: m for m in list_modes(connection, known=["Other"])}
    assert [(name, m.mode, m.source) for name, m in modes.items()] == [
        ("*", "enforce", "settings"),
        ("Other", "enforce", "settings"),
        (FEATURE, "observe", "run time"),
    ]
    assert (modes[FEATURE].denied, modes[FEATURE].denied_tokens, modes[FEATURE].denied_users) == (3, 1_500, 2)
    (denial,) = list_observed_denials(connection)
    assert (denial.reason, denial.times, denial.tokens, denial.users) == ("insufficient_tokens", 3, 1_500, 2)
    status = read_status(connection)
    assert (status.observed_denials, status.observed_denial_tokens) == (3, 1_500)


def test_old_denials_are_deleted(host: Host, connection: Connection) -> None:
    user = host.subscriber(100)
    mode(connection, "observe")
    for _ in range(3):
        hold_tokens(connection, user, 500)
    host.execute("UPDATE trueup.observed_denial SET denied_at = now() - interval '91 days' WHERE id % 3 <> 0")
    kept = timedelta(days=90)
    pruned = [prune_denials(connection, older_than=kept, limit=1) for _ in range(3)]
    assert pruned == [1, 1, 0]
    assert len(denials(host)) == 1


@pytest.mark.parametrize(("set_to", "passes"), [("enforce", False), ("observe", True), ("off", True)])
def test_the_gate_of_a_view_obeys_the_mode_and_a_plain_check_does_not(
    host: Host, connection: Connection, set_to: str, passes: bool
) -> None:
    user = host.subscriber(100)
    mode(connection, set_to)
    assert check_gate(connection, user, 500, FEATURE)["has_access"] is passes
    assert token_gate(500, FEATURE).ask(user)["has_access"] is passes
    assert check_ai_access_for_user(user, 500, FEATURE)["has_access"] is False
    assert mode_of(connection, FEATURE) == set_to
    assert len(denials(host)) == (2 if set_to == "observe" else 0)


def test_every_other_feature_can_be_named_in_the_settings_too(
    connection: Connection, settings: pytest.MonkeyPatch
) -> None:
    settings.setenv("TRUEUP_GATE", '{"default_mode": "observe", "modes": {"*": "enforce", "Other": "off"}}')
    get_settings.cache_clear()
    assert [mode_of(connection, name) for name in (FEATURE, "Other")] == ["enforce", "off"]


@pytest.mark.parametrize("name", ["", " ", "a\x00", "caf\udce9", "a" * 201])
def test_a_name_that_no_feature_can_have_is_refused(connection: Connection, name: str) -> None:
    with pytest.raises(InvalidInputError, match="feature"):
        mode(connection, "observe", name)
