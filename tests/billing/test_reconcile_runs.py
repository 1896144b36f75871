from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import text

from billing import db
from billing.errors import NotInstalledError, ServiceUnavailableError
from billing.mapping import HostMapping
from billing.reconcile import reconcile
from billing.reconcile_runs import RUN_LOCK, RunInProgressError, RunSummary
from tests.support.host import Host
from tests.support.sessions import locked, wait_until


@pytest.fixture
def run(host: Host) -> Callable[..., RunSummary]:
    def run(**more: Any) -> RunSummary:
        return reconcile(db.get_engine(), HostMapping(), **more)

    return run


def missed(host: Host, used: int = 300) -> int:
    """A user whose row was logged and never subtracted from the counter."""
    user = host.subscriber(10_000)
    host.log(user, used)
    return user


def test_one_user_may_be_reconciled_alone(host: Host, run: Callable[..., RunSummary]) -> None:
    user, other = missed(host), missed(host)
    assert run(only_user=user).checked == 1
    assert (host.counter(user), host.counter(other)) == (9_700, 10_000)
    assert run(only_user=host.user()).checked == 0


@pytest.mark.parametrize("batch_size", [1, 2, 5, 6])
def test_every_subscription_is_checked_once_whatever_the_batch(
    host: Host, run: Callable[..., RunSummary], batch_size: int
) -> None:
    users = [missed(host, 100 + number) for number in range(5)]
    seen: list[tuple[int, int]] = []
    summary = run(batch_size=batch_size, progress=lambda *figures: seen.append(figures))
    assert (summary.checked, summary.corrected) == (5, 5)
    assert [host.counter(user) for user in users] == [9_900 - number for number in range(5)]
    assert seen[-1] == (5, 5)
    assert list(host.execute("SELECT user_id FROM trueup.drift ORDER BY id").scalars()) == users


def test_runs_do_not_overlap(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)
    with locked(host, "SELECT pg_advisory_lock(:key)", key=RUN_LOCK) as other:
        with pytest.raises(RunInProgressError):
            run()
        with pytest.raises(RunInProgressError):
            run(dry_run=True)
        other.execute(text("SELECT pg_advisory_unlock_all()"))
    assert run().corrected == 1
    assert run().checked == 1


def test_a_killed_run_is_marked_interrupted_by_the_next(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)
    killed = []

    def kill(*_: Any) -> None:
        pid = host.value(
            "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted "
            "AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        )
        host.execute("SELECT pg_terminate_backend(:pid)", pid=pid)
        wait_until(lambda: host.value("SELECT count(*) FROM pg_stat_activity WHERE pid = :pid", pid=pid) == 0)
        killed.append(pid)
        raise SystemExit

    with pytest.raises((SystemExit, ServiceUnavailableError)):
        run(progress=kill)
    assert killed
    host.execute("UPDATE trueup.reconcile_run SET status = 'running', finished_at = NULL, error = NULL")
    run()
    rows = host.execute("SELECT status, finished_at IS NULL FROM trueup.reconcile_run ORDER BY id").all()
    assert [tuple(row) for row in rows] == [("interrupted", False), ("finished", False)]


def test_a_run_that_fails_says_why_and_lets_the_next_one_run(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of ink")

    with pytest.raises(RuntimeError, match="out of ink"):
        run(progress=fail)
    status, error = host.execute("SELECT status, error FROM trueup.reconcile_run").one()
    assert (status, error) == ("failed", "out of ink")
    assert run().checked == 1


def test_a_run_whose_connection_is_cut_reports_the_database_as_unavailable(
    host: Host, run: Callable[..., RunSummary]
) -> None:
    missed(host)

    def cut(*_: Any) -> None:
        host.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'trueup'")

    with pytest.raises(ServiceUnavailableError):
        run(batch_size=1, progress=cut)
    assert run().checked == 1


def test_a_run_on_a_database_without_trueup_says_how_to_set_it_up(empty_database: str) -> None:
    with pytest.raises(NotInstalledError, match="trueup db init"):
        reconcile(db.get_engine(), HostMapping())


def test_a_run_keeps_no_transaction_open_between_its_batches(host: Host, run: Callable[..., RunSummary]) -> None:
    missed(host)
    states: list[str] = []
    run(
        progress=lambda *_: states.extend(
            host.execute(
                "SELECT state FROM pg_stat_activity WHERE application_name = 'trueup' AND datname = current_database()"
            ).scalars()
        )
    )
    assert set(states) == {"idle"}
