"""What each operation on a hold returns, and which columns of trueup's tables it changes, to the token and second."""

from datetime import datetime
from typing import Any

import pytest
from sqlalchemy import Connection, text

from tests.support.books import assert_true
from tests.support.host import NOW, Host, after
from tests.support.work import OWNER, charge_tokens, hold_tokens
from trueup.errors import HoldBusyError, TokensDenied
from trueup.gate.holds import Hold, abandon_calls, close_abandoned_hold, close_hold, expire_holds, keep_holds
from trueup.gate.provider_calls import begin_call, end_call, extend_hold
from trueup.usage.charges import Charge

TIMES = {"lease_seconds": 30, "ttl_seconds": 600}
# The tables, and what names a row of one task in them.
TABLES = {"hold": ("id",), "call": ("call_key", "attempt"), "charge": ("call_key",), "balance": ()}
KEYS = {"user_id", "task_id", "call_key", "id", "log_id"}
NEW_HOLD = {
    "request": "", "feature_name": "Test", "section": "chat", "owner": OWNER, "status": "open", "completed": False,
    "attempt": 1, "retries": 0, "fresh_retries": 0, "duplicate_waits": 0, "opened_at": 0, "lease_until": 30,
    "expires_at": 600, "tokens_reserved": 600, "tokens_covered": 0, "tokens_charged": 0, "calls": 0,
}  # fmt: skip


LONG_WAY = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
    DECLARE v_stack text;
    BEGIN
        GET DIAGNOSTICS v_stack = PG_CONTEXT;
        IF v_stack NOT LIKE '%record_other_charge(%' THEN
            RAISE 'not the short way';
        END IF;
        RETURN NEW;
    END $$;
    CREATE TRIGGER refuse BEFORE INSERT ON ai_usage_log FOR EACH ROW EXECUTE FUNCTION refuse()
"""
CALL = {"attempt": 1, "outcome": "started"}
CHARGE = {
    "attempt": 1,
    "section": "chat",
    "model_name": "test-model",
    "late": False,
    "hold_id": 1,
    "counter_lowered": True,
}


def charged(tokens_left: int, **more: Any) -> Charge:
    return Charge(**{"recorded": True, "late": False, "tokens_over": 0, "tokens_left": tokens_left, **more})


class Task:
    """A task `t` of a user with 1,000 tokens, and its rows. `changes` compares them with those at its last call."""

    def __init__(self, host: Host, connection: Connection) -> None:
        self.connection = connection
        self.user = host.subscriber(1_000)
        self._host = host
        self._known: dict[str, dict[str, Any]] = {}

    def changes(self) -> dict[str, dict[str, Any] | None]:
        """Return the changed columns of each row; a new row without its nulls; None for a deleted row.

        Times are seconds after NOW.
        """
        rows = {}
        for table, names in TABLES.items():
            for row in self._host.execute(
                f"SELECT * FROM trueup.{'call_intent' if table == 'call' else table}"
            ).mappings():
                values = {
                    column: round((value - NOW).total_seconds()) if isinstance(value, datetime) else value
                    for column, value in row.items()
                    if column not in KEYS
                }
                rows[" ".join([table, *(str(row[name]) for name in names)])] = values
        changed: dict[str, dict[str, Any] | None] = {}
        for name, values in rows.items():
            before = self._known.get(name, dict.fromkeys(values))
            if difference := {column: value for column, value in values.items() if value != before[column]}:
                changed[name] = difference
        changed |= {name: None for name in self._known if name not in rows}
        self._known = rows
        assert_true(self._host)
        return changed

    def deliver(self, seconds: float = 0, **more: Any) -> Hold:
        values = {"lease": 30, "ttl": 600, "now": after(seconds), **more}
        return hold_tokens(self.connection, self.user, values.pop("tokens", 600), task="t", **values)

    def duplicate(self, seconds: float, **more: Any) -> tuple[float, bool, int]:
        with pytest.raises(HoldBusyError) as busy:
            self.deliver(seconds, **more)
        return busy.value.seconds, busy.value.redundant, busy.value.waits

    def begin(self, hold: Hold, key: str, bound: int, seconds: float) -> int | None:
        return begin_call(self.connection, hold, call_key=key, max_tokens=bound, now=after(seconds), **TIMES)

    def charge(self, hold: Hold, key: str, tokens: int, seconds: float, **more: Any) -> Charge:
        return charge_tokens(self.connection, hold, tokens, key=key, now=after(seconds), **more)

    def close(self, hold: Hold, seconds: float, **more: Any) -> str | None:
        return close_hold(self.connection, hold, now=after(seconds), **more)


@pytest.fixture(params=["short way", "long way"])
def task(request: pytest.FixtureRequest, host: Host, connection: Connection) -> Task:
    """Give a task whose gate and charges take the short way, or the long way.

    The gate takes the long way because of deltas, whose sum is 0; a charge, because the host refuses the short one.
    """
    task = Task(host, connection)
    connection.execute(text("SELECT trueup.refresh_balances(ARRAY[:user]::bigint[], NULL)"), {"user": task.user})
    if request.param == "long way":
        host.execute("DELETE FROM ai_usage_log WHERE id = :row", row=host.log(task.user, 5))
        host.execute(LONG_WAY)
    task.changes()
    return task


def test_one_attempt_in_several_calls(task: Task) -> None:
    own = {"request": "r", "retries": 1, "fresh_retries": 2}
    hold = task.deliver(**own)
    assert (hold.attempt, hold.reattached, hold.replay, hold.follows, hold.tokens_left) == (1, False, False, False, 600)
    assert (hold.expires_at, hold.overridden, hold.retries, hold.fresh_retries) == (after(600), None, 1, 2)
    assert task.changes() == {"hold 1": NEW_HOLD | own, "balance": {"held": 600}}

    assert task.begin(hold, "1", 500, 1) is None
    call = CALL | {"tokens_bound": 500, "started_at": 1}
    assert task.changes() == {"hold 1": {"lease_until": 31, "expires_at": 601}, "call 1 1": call}
    assert task.begin(hold, "2", 50, 2) is None
    call = CALL | {"tokens_bound": 50, "started_at": 2}
    assert task.changes() == {"hold 1": {"lease_until": 32, "expires_at": 602}, "call 2 1": call}
    assert task.begin(hold, "3", 51, 3) == 50
    assert task.changes() == {"hold 1": {"lease_until": 33, "expires_at": 603}}

    assert task.charge(hold, "1", 300, 4, answer={"text": "a"}) == charged(250)
    assert task.changes() == {
        "hold 1": {"tokens_covered": 300, "tokens_charged": 300, "calls": 1},
        "charge 1": CHARGE | {"tokens_total": 300, "tokens_covered": 300, "charged_at": 4, "answer": {"text": "a"}},
        "call 1 1": None,
        "balance": {"consumed": 300, "held": 300},
    }
    assert task.charge(hold, "1", 300, 5) == charged(250, recorded=False)
    end_call(task.connection, hold, call_key="2", unknown=True)
    assert task.changes() == {"call 2 1": {"outcome": "unknown"}}

    assert extend_hold(task.connection, hold, 101, now=after(5)) == (None, 401)
    assert task.changes() == {"hold 1": {"tokens_reserved": 701}, "balance": {"held": 401}}
    assert extend_hold(task.connection, hold, 300, now=after(5)) == ("insufficient_tokens", 401)
    with pytest.raises(TokensDenied, match="300 needed, 299 available"):
        hold_tokens(task.connection, task.user, 300, now=after(5))
    assert task.changes() == {}
    assert keep_holds(task.connection, [hold], max_seconds=3_600, now=after(6), **TIMES) == 1
    assert task.changes() == {"hold 1": {"lease_until": 36, "expires_at": 606}}

    assert task.duplicate(7, **own) == (29, False, 1)
    assert task.changes() == {"hold 1": {"duplicate_until": 36, "duplicate_waits": 1}}
    assert task.duplicate(8, **own) == (28, True, 2)
    assert task.changes() == {}
    assert task.duplicate(9, waits=1, **own) == (27, False, 2)
    assert task.changes() == {"hold 1": {"duplicate_waits": 2}}

    assert task.begin(hold, "4", 402, 10) == 401
    assert task.begin(hold, "4", 401, 11) is None
    call = CALL | {"tokens_bound": 401, "started_at": 11}
    assert task.changes() == {"hold 1": {"lease_until": 41, "expires_at": 611}, "call 4 1": call}
    assert task.begin(hold, "4", 200, 12) is None
    call = {"tokens_bound": 200, "started_at": 12}
    assert task.changes() == {"hold 1": {"lease_until": 42, "expires_at": 612}, "call 4 1": call}
    end_call(task.connection, hold, call_key="4", unknown=False)
    assert task.changes() == {"call 4 1": None}
    assert task.charge(hold, "5", 500, 13) == charged(0, tokens_over=99)
    assert task.changes() == {
        "hold 1": {"tokens_covered": 701, "tokens_charged": 800, "calls": 2},
        "charge 5": CHARGE | {"tokens_total": 500, "tokens_covered": 401, "charged_at": 13},
        "balance": {"consumed": 800, "held": 0},
    }
    assert task.close(hold, 14, completed=True) == "settled"
    assert task.changes() == {"hold 1": {"status": "settled", "closed_at": 14, "completed": True}}


def test_a_last_charge_beside_a_call_in_flight(task: Task) -> None:
    hold = task.deliver()
    task.begin(hold, "1", 200, 0)
    task.begin(hold, "2", 300, 0)
    task.changes()
    assert task.charge(hold, "1", 150, 1, last=True) == charged(150)
    assert task.changes() == {
        "hold 1": {"tokens_covered": 150, "tokens_charged": 150, "calls": 1},
        "charge 1": CHARGE | {"tokens_total": 150, "tokens_covered": 150, "charged_at": 1},
        "call 1 1": None,
        "balance": {"consumed": 150, "held": 450},
    }
    assert task.close(hold, 2) == "settled"
    assert task.changes() == {"hold 1": {"status": "settled", "closed_at": 2}, "balance": {"held": 0}}


def test_a_slow_attempt_beside_two_later_ones(task: Task) -> None:
    slow = task.deliver()
    task.begin(slow, "0", 70, 7)
    end_call(task.connection, slow, call_key="0", unknown=True)
    task.begin(slow, "1", 200, 8)
    task.changes()
    second = task.deliver(40, retries=2, fresh_retries=3)
    assert (second.attempt, second.reattached, second.replay, second.tokens_left) == (2, True, False, 600)
    assert (second.expires_at, second.retries, second.fresh_retries) == (after(640), 2, 3)
    taken = {"attempt": 2, "retries": 2, "fresh_retries": 3, "lease_until": 70, "expires_at": 640}
    assert task.changes() == {"hold 1": taken | {"tokens_reserved": 800}, "balance": {"held": 800}}

    task.begin(second, "1", 300, 41)
    task.changes()
    assert task.close(second, 42, completed=True) == "open"
    kept_until = 641 + (641 - 8)
    kept = {"body_ended_at": 42, "completed": True, "tokens_reserved": 200, "expires_at": kept_until}
    assert task.changes() == {"hold 1": kept, "call 1 2": {"outcome": "unknown"}, "balance": {"held": 200}}

    third = task.deliver(43, retries=3)
    assert (third.attempt, third.reattached, third.replay, third.tokens_left) == (3, True, True, 0)
    taken = {"attempt": 3, "retries": 3, "lease_until": 73, "expires_at": 643, "body_ended_at": None}
    assert task.changes() == {"hold 1": taken}
    assert task.close(third, 44) == "open"
    assert task.changes() == {"hold 1": {"body_ended_at": 44, "expires_at": 643 + (643 - 8)}}

    assert task.charge(slow, "1", 150, 45) == charged(0, late=True)
    settled = {"status": "settled", "closed_at": 45, "calls": 1}
    assert task.changes() == {
        "hold 1": settled | {"tokens_reserved": 150, "tokens_covered": 150, "tokens_charged": 150},
        "charge 1": CHARGE | {"late": True, "tokens_total": 150, "tokens_covered": 150, "charged_at": 45},
        "call 1 1": None,
        "balance": {"consumed": 150, "held": 0},
    }
    assert task.charge(second, "1", 250, 46) == charged(0, late=True, tokens_over=250)
    uncovered = {"attempt": 2, "late": True, "tokens_total": 250, "tokens_covered": 0, "charged_at": 46}
    charge = CHARGE | uncovered
    del charge["hold_id"]
    assert task.changes() == {"charge 1~2": charge, "call 1 2": None, "balance": {"consumed": 400}}

    replay = task.deliver(47)
    assert (replay.attempt, replay.reattached, replay.replay, replay.tokens_left) == (4, False, True, 0)
    opened = {"attempt": 4, "retries": 3, "fresh_retries": 3, "completed": True, "tokens_reserved": 0}
    times = {"opened_at": 47, "lease_until": 77, "expires_at": 647}
    assert task.changes() == {"hold 2": NEW_HOLD | opened | times}
    assert task.close(replay, 48) == "released"
    assert task.changes() == {"hold 2": {"status": "released", "closed_at": 48}}


def test_tokens_are_kept_for_as_long_as_the_last_slow_call_may_take(task: Task) -> None:
    slow = task.deliver(tokens=300)
    task.begin(slow, "1", 100, 0)
    task.begin(slow, "2", 150, 20)
    second = task.deliver(60, tokens=300)
    task.changes()
    assert task.close(second, 61) == "open"
    kept = {"body_ended_at": 61, "tokens_reserved": 250, "expires_at": 660 + (660 - 20)}
    assert task.changes() == {"hold 1": kept, "balance": {"held": 250}}
    assert keep_holds(task.connection, [second], max_seconds=3_600, now=after(62), **TIMES) == 0
    assert task.changes() == {}
    assert expire_holds(task.connection, now=after(1_300)) == (1, 250)


def test_a_hold_that_no_longer_covers_the_slow_calls_keeps_what_it_has(task: Task) -> None:
    slow = task.deliver(tokens=400)
    task.begin(slow, "1", 200, 0)
    task.begin(slow, "2", 200, 0)
    second = task.deliver(60, tokens=400)
    assert task.charge(second, "3", 700, 61) == charged(0)  # the provider billed more than the 400 that it might
    assert task.close(second, 62) == "open"
    task.changes()
    assert task.charge(slow, "1", 150, 63) == charged(0, late=True, tokens_over=150)
    assert task.changes() == {
        "hold 1": {"tokens_charged": 850, "calls": 2},
        "charge 1": CHARGE | {"late": True, "tokens_total": 150, "tokens_covered": 0, "charged_at": 63},
        "call 1 1": None,
        "balance": {"consumed": 850},
    }
    assert task.charge(slow, "2", 100, 64) == charged(0, late=True)
    assert task.changes() == {
        "hold 1": {"status": "settled", "closed_at": 64, "tokens_covered": 800, "tokens_charged": 950, "calls": 3},
        "charge 2": CHARGE | {"late": True, "tokens_total": 100, "tokens_covered": 100, "charged_at": 64},
        "call 2 1": None,
        "balance": {"consumed": 950, "held": 0},
    }


def test_an_attempt_that_returns_after_its_slow_predecessor_was_kept_covered(task: Task) -> None:
    slow = task.deliver(tokens=500)
    task.begin(slow, "3", 450, 0)
    second = task.deliver(90, tokens=500)
    task.begin(second, "4", 20, 91)
    task.changes()
    assert task.close(second, 92) == "open"
    kept = {"body_ended_at": 92, "tokens_reserved": 450, "expires_at": 691 + 691}
    assert task.changes() == {"hold 1": kept, "call 4 2": {"outcome": "unknown"}, "balance": {"held": 450}}
    third = task.deliver(93, tokens=500)
    assert (third.attempt, third.reattached, third.replay, third.tokens_left) == (3, True, False, 500)
    taken = {"attempt": 3, "lease_until": 123, "expires_at": 693, "body_ended_at": None, "tokens_reserved": 950}
    assert task.changes() == {"hold 1": taken, "balance": {"held": 950}}
    assert task.charge(third, "6", 600, 94) == charged(0)
    task.changes()
    assert task.close(third, 95) == "open"
    task.changes()
    assert task.charge(slow, "3", 449, 96) == charged(0, late=True, tokens_over=99)
    assert task.changes() == {
        "hold 1": {"status": "settled", "closed_at": 96, "tokens_covered": 950, "tokens_charged": 1_049, "calls": 2},
        "charge 3": CHARGE | {"late": True, "tokens_total": 449, "tokens_covered": 350, "charged_at": 96},
        "call 3 1": None,
        "balance": {"consumed": 1_049, "held": 0},
    }


def test_a_hold_that_expires_in_a_call_and_one_whose_process_dies(task: Task) -> None:
    hold = task.deliver()
    task.begin(hold, "1", 400, 8)
    task.charge(hold, "0", 30, 9)
    task.changes()
    assert expire_holds(task.connection, now=after(607)) == (0, 0)
    assert expire_holds(task.connection, now=after(608)) == (0, 170)
    kept = {"tokens_reserved": 430, "expires_at": 1_208, "body_ended_at": 608}
    assert task.changes() == {"hold 1": kept, "balance": {"held": 400}}
    assert expire_holds(task.connection, now=after(1_208)) == (1, 400)
    assert task.changes() == {"hold 1": {"status": "expired", "closed_at": 1_208}, "balance": {"held": 0}}

    second = task.deliver(1_209, tokens=500)
    assert (second.attempt, second.reattached, second.tokens_left) == (2, False, 500)
    times = {"opened_at": 1_209, "lease_until": 1_239, "expires_at": 1_809}
    assert task.changes() == {
        "hold 2": NEW_HOLD | {"attempt": 2, "tokens_reserved": 500} | times,
        "call 1 1": {"outcome": "unknown"},
        "balance": {"held": 500},
    }
    task.begin(second, "1", 100, 1_210)
    task.begin(second, "2", 100, 1_211)
    task.changes()
    abandon_calls(task.connection, task.user, "t", owner=OWNER)
    assert task.changes() == {"call 1 2": {"outcome": "unknown"}, "call 2 2": {"outcome": "unknown"}}
    assert close_abandoned_hold(task.connection, task.user, "t", owner=OWNER, now=after(1_212)) == "released"
    assert task.changes() == {"hold 2": {"status": "released", "closed_at": 1_212}, "balance": {"held": 0}}
