"""Open holds, unresolved calls and messages, reconcile runs, and the invariants that are cheap to check."""

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Row, text

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.gate.owed_charges import list_owed_charges
from trueup.host.sql import render_statement
from trueup.monitoring.status import read_gauges
from trueup.reconcile.audit import OVERDUE_AFTER
from trueup.reconcile.missed_runs import find_missed_runs
from trueup.settings.settings import Settings
from trueup.usage.charge_events import last_failure
from trueup.usage.outbox import count_unresolved_effects

# A charge is told at once, and after a failure within an hour.
OLD_EVENT_SECONDS = 300
# A task keeps its hold while it retries, but never for a day.
OLD_HOLD_SECONDS = 86_400
# The number of balances that are compared with the log. `trueup reconcile --deep` compares all.
SAMPLE = 200


def check_holds(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check for old holds, and for holds that should have expired."""
    figures = read_gauges(connection)
    open_holds, oldest = int(figures["holds_open"][0] or 0), figures["oldest_hold_seconds"][0]
    statement = text(
        "SELECT count(*) FROM trueup.hold "
        "WHERE status = 'open' AND expires_at < clock_timestamp() - CAST(:overdue_after AS interval)"
    )
    overdue = connection.scalar(statement, {"overdue_after": OVERDUE_AFTER})
    detail = {"open": open_holds, "oldest_seconds": oldest, "overdue": overdue}
    if overdue:
        minutes = OVERDUE_AFTER.total_seconds() / 60
        what = f"{overdue} holds should have expired more than {minutes:.0f} minutes ago: their tokens stay reserved."
        remedy = "Check that beat and a worker of queue trueup-reconcile run. The task trueup.expire_holds ends them."
        yield warning("holds", what, remedy, **detail)
    elif oldest is not None and oldest > OLD_HOLD_SECONDS:
        what = f"A hold has been open for {oldest / 3600:.0f} hours."
        yield warning("holds", what, "Find its task with `trueup holds list`.", **detail)
    else:
        age = "" if oldest is None else f", the oldest for {oldest:.0f} s"
        yield ok("holds", f"{open_holds} open holds{age}.", **detail)


def check_unresolved(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check for calls that may have been billed but were not recorded, and for messages that may have been sent."""
    figures = read_gauges(connection)
    calls, max_tokens = int(figures["unrecorded_calls"][0] or 0), int(figures["unrecorded_tokens_bound"][0] or 0)
    now = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    messages = count_unresolved_effects(connection, now)
    if calls:
        what = f"{calls} provider calls were started but not recorded. They may have cost up to {max_tokens:,} tokens."
        remedy = "Compare the calls in `trueup status` with the provider's bill."
        yield warning("calls", what, remedy, calls=calls, tokens_bound=max_tokens)
    else:
        yield ok("calls", "Every call that started has been recorded.", calls=0, tokens_bound=0)
    if messages:
        remedy = "Check at the receiver whether the messages in `trueup status` arrived."
        yield warning("messages", f"{messages} messages may have been sent.", remedy, messages=messages)
    else:
        yield ok("messages", "The outcome of every message is known.", messages=0)


def check_owed_charges(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield the charges whose row the usage log refused, with the reason of the oldest."""
    figures = read_gauges(connection)
    charges, tokens = int(figures["owed_charges"][0] or 0), int(figures["owed_tokens"][0] or 0)
    if not charges:
        yield ok("owed_charges", "The usage log has the row of every charge.", charges=0, tokens=0)
        return
    if settings.host.usage_log.record == "host":
        yield from _awaited_charges(connection)
        return
    oldest = list_owed_charges(connection, limit=1)
    refusal = oldest[0].refusal if oldest else "written meanwhile"
    yield error(
        "owed_charges",
        f"The usage log refused the rows of {charges} charges of {tokens:,} tokens. They count against the budgets, "
        f"but the host doesn't see them. The oldest: {refusal}",
        "Correct what refuses the rows: a constraint, a trigger or a missing column of the log. trueup tries again "
        "each minute. `trueup status` lists them.",
        charges=charges,
        tokens=tokens,
    )


_AWAITED = text(
    """
    SELECT count(*) AS charges, coalesce(sum(total_tokens), 0) AS tokens FROM trueup.owed_charge
    WHERE owed_since < clock_timestamp() - interval '10 minutes'
    """
)


def _awaited_charges(connection: Connection) -> Iterator[Finding]:
    """Check that the host logs the calls that it is to log (`usage_log.record`)."""
    row = connection.execute(_AWAITED).one()
    figures = {"charges": int(row.charges), "tokens": int(row.tokens)}
    if not row.charges:
        yield ok("owed_charges", "The host logs the calls of trueup's tasks.", **figures)
        return
    yield warning(
        "owed_charges",
        f"The host has logged no row for {row.charges} calls of {row.tokens:,} tokens in ten minutes. They count "
        "against the budgets, but the host doesn't see them.",
        "Check that the host's tracker runs for these tasks (`trueup status` lists them), or let trueup log them: "
        'remove record = "host" under [host.usage_log].',
        **figures,
    )


def check_charge_events(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that the host's function gets each charge in time."""
    figures = read_gauges(connection)
    events, oldest = int(figures["charge_events"][0] or 0), figures["oldest_charge_event_seconds"][0]
    detail = {"events": events, "oldest_seconds": oldest}
    if oldest is None or oldest < OLD_EVENT_SECONDS:
        yield ok("charge_events", f"{events} charges wait until on_charge is called.", **detail)
        return
    what = f"{events} charges have not been told to on_charge, the oldest for {oldest / 60:.0f} minutes."
    if settings.on_charge is None:
        remedy = "Set TRUEUP_ON_CHARGE again, or run DELETE FROM trueup.charge_event to forget them."
        yield warning("charge_events", what, remedy, **detail)
        return
    failure = last_failure(connection)
    if failure is not None:
        what = f"{what} The oldest failure: {failure}"
        remedy = "Correct the function. trueup calls it again within an hour."
    else:
        remedy = "Check that beat and a worker of queue trueup-reconcile run, and that both have TRUEUP_ON_CHARGE."
    yield warning("charge_events", what, remedy, **detail)


def check_runs(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check for missed and failed runs, and for drifts that the newest run left for review."""
    missed = find_missed_runs(connection)
    for gap in missed:
        remedy = "Check that beat and a worker of queue trueup-reconcile run, or run `trueup reconcile`."
        yield error("reconcile", gap.message, remedy, **gap.content())
    statement = text(
        "SELECT id, kind, status, error, in_review, coalesce(finished_at, started_at) AS at "
        "FROM trueup.reconcile_run WHERE only_user IS NULL AND NOT dry_run ORDER BY id DESC LIMIT 1"
    )
    run = connection.execute(statement).one_or_none()
    if run is None:
        if not missed:
            yield ok("reconcile", "No run over all users yet; the first run is not overdue.")
        return
    detail = {"run_id": run.id, "kind": run.kind, "status": run.status, "at": run.at.isoformat()}
    what = f"Run {run.id} ({run.kind}) {run.status} at {run.at:%Y-%m-%d %H:%M} UTC"
    if run.status == "failed":
        yield error("reconcile", f"{what}: {run.error}", f"See `trueup drift report --run {run.id}`.", **detail)
    elif run.in_review:
        what = f"{what}; {run.in_review} drifts wait for a person."
        yield warning("reconcile", what, "Decide with `trueup drift review`.", **detail, in_review=run.in_review)
    elif not missed:
        yield ok("reconcile", f"{what}.", **detail)


def check_beat(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check when beat last started a run. While a run is in progress, no other run starts."""
    statement = text(
        "SELECT extract(epoch FROM clock_timestamp() - coalesce(max(r.started_at), min(i.installed_at))) AS seconds, "
        "count(r.id) AS runs, coalesce(bool_or(r.status = 'running'), false) AS running FROM trueup.installation i "
        "LEFT JOIN trueup.reconcile_run r ON r.period IS NOT NULL OR r.status = 'running'"
    )
    row = connection.execute(statement).one()
    seconds, limit = float(row.seconds), 2 * settings.reconcile_interval_seconds
    detail = {"seconds": round(seconds), "interval_seconds": settings.reconcile_interval_seconds, "runs": row.runs}
    if seconds <= limit or row.running:
        what = f"The last scheduled run started {seconds:.0f} s ago." if row.runs else "No scheduled run is due yet."
        yield ok("beat", what, **detail)
        return
    when = f"The last scheduled run started {seconds:.0f} s ago" if row.runs else f"No scheduled run in {seconds:.0f} s"
    what = f"{when}; a run is due every {settings.reconcile_interval_seconds} s."
    worker = "celery -A trueup.worker worker -Q trueup-reconcile -n trueup-reconcile@%h"
    remedy = f"Start `celery -A trueup.worker beat` and `{worker}`."
    yield error("beat", what, remedy, **detail)


# I4, for all users: compares the balances that hold tokens with the open holds.
_MISMATCHED_HOLDS = text(
    """
    SELECT count(*) AS users, min(CAST(user_id AS text)) AS example
    FROM (SELECT user_id, held FROM trueup.balance WHERE held <> 0) b
    FULL JOIN (SELECT user_id, sum(tokens_reserved - tokens_covered) AS tokens FROM trueup.hold
               WHERE status = 'open' GROUP BY user_id) h USING (user_id)
    WHERE coalesce(b.held, 0) <> coalesce(h.tokens, 0)
    """
)

# I1, for a sample. A balance that is marked stale is rebuilt when it is read next, and is no defect.
_MISMATCHED_BALANCES = """
    {% from "host/rows.sql" import used_since, window_start %}
    WITH sample AS MATERIALIZED (
        SELECT b.* FROM trueup.balance b TABLESAMPLE BERNOULLI (:share) LIMIT :most
    ), fresh AS (
        SELECT b.* FROM sample b JOIN {{ subscription }} s ON s.{{ subscription.user_id }} = b.user_id
        WHERE b.log_epoch = (SELECT coalesce(max(id), 0) FROM trueup.log_truncation)
          AND b.window_start = {{ window_start("s") }}
    )
    SELECT count(*) AS looked_at, count(*) FILTER (WHERE f.consumed + d.tokens <> l.tokens) AS users,
           min(CAST(f.user_id AS text)) FILTER (WHERE f.consumed + d.tokens <> l.tokens) AS example
    FROM fresh f
    CROSS JOIN LATERAL (SELECT coalesce(sum(t.tokens), 0) AS tokens FROM trueup.usage_delta t
                        WHERE t.user_id = f.user_id AND t.used_at >= f.window_start) d
    CROSS JOIN LATERAL ({{ used_since("f.user_id", "f.window_start") }}) l
"""


# I7, for a sample of the users with a change in the journal. Entries of one transaction may be out of order, if a
# trigger of the host's writes the counter too. So the first value and the sum of all changes are compared.
_UNSEEN_CHANGES = """
    WITH sample AS MATERIALIZED (
        SELECT DISTINCT e.user_id FROM trueup.counter_entry e TABLESAMPLE SYSTEM (:share) LIMIT :most
    ), chains AS (
        SELECT e.user_id, e.subscription_id,
               sum(coalesce(e.new_counter, 0) - coalesce(e.old_counter, 0))
                   + (array_agg(coalesce(e.old_counter, 0) ORDER BY e.id))[1] AS reached
        FROM sample m JOIN trueup.counter_entry e ON e.user_id = m.user_id
        -- A subscription that was deleted, or truncated, and made again has a new chain.
        WHERE e.id >= (SELECT coalesce(max(c.id), 0) FROM trueup.counter_entry c
                       WHERE c.user_id = e.user_id AND c.subscription_id = e.subscription_id AND c.kind = 'created')
        GROUP BY 1, 2
    )
    SELECT count(DISTINCT c.user_id) AS looked_at,
           count(*) FILTER (WHERE c.reached <> coalesce(s.counter, 0)) AS users,
           min(CAST(c.user_id AS text)) FILTER (WHERE c.reached <> coalesce(s.counter, 0)) AS example
    FROM chains c
    JOIN (SELECT t.{{ subscription.user_id }} AS user_id, CAST(t.{{ subscription.id }} AS text) AS subscription_id,
                      CAST(t.{{ subscription.tokens_remaining }} AS bigint) AS counter
               FROM {{ subscription }} t) s ON s.user_id = c.user_id AND s.subscription_id = c.subscription_id
    WHERE trueup.journal_since() IS NOT NULL
"""


def check_invariants(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Check that balances equal the sums of their holds, and a sample of them the sums of the log."""
    row = connection.execute(_MISMATCHED_HOLDS).one()
    if row.users:
        yield _mismatch(f"The held tokens of {row.users} users differ from the sum of their open holds", "I4", row)
    else:
        yield ok("books", "The held tokens of every user equal the sum of their open holds.", invariant="I4")
    # -1: unknown before the first ANALYZE.
    rows = connection.scalar(text("SELECT reltuples FROM pg_class WHERE oid = to_regclass('trueup.balance')"))
    share = min(100.0, 200.0 * SAMPLE / rows) if rows and rows > 0 else 100.0
    statement = render_statement(_MISMATCHED_BALANCES, settings.host)
    row = connection.execute(statement, {"share": share, "most": SAMPLE}).one()
    if row.users:
        what = f"The balances of {row.users} of {row.looked_at} users differ from the sum of their log rows"
        yield _mismatch(what, "I1", row)
    else:
        what = f"The balances of {row.looked_at} random users equal the sums of their log rows."
        yield ok("books", what, invariant="I1", looked_at=row.looked_at)
    yield _check_journal(connection, settings)


def _check_journal(connection: Connection, settings: Settings) -> Finding:
    rows = connection.scalar(text("SELECT reltuples FROM pg_class WHERE oid = to_regclass('trueup.counter_entry')"))
    # A page has about sixty entries.
    share = min(100.0, 100.0 * 60 * SAMPLE / rows) if rows and rows > 0 else 100.0
    statement = render_statement(_UNSEEN_CHANGES, settings.host)
    row = connection.execute(statement, {"share": share, "most": SAMPLE}).one()
    if not row.users:
        what = f"The counters of {row.looked_at} random users are what the journal of their changes leads to."
        return ok("books", what, invariant="I7", looked_at=row.looked_at)
    what = f"{row.users} counters are not what the journal of their changes leads to, for example user {row.example}'s."
    remedy = (
        "A session changed them while trueup's trigger did not fire (session_replication_role, or a disabled trigger). "
        "Find it, then run `trueup db attach`."
    )
    return error("books", what, remedy, invariant="I7", users=row.users, example=row.example)


def _mismatch(what: str, invariant: str, row: Row[Any]) -> Finding:
    what = f"{what}, for example user {row.example}."
    remedy = "Run `trueup reconcile --deep`, which repairs and reports them. Then find the writes that no trigger saw."
    return error("books", what, remedy, invariant=invariant, users=row.users, example=row.example)
