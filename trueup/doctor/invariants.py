"""How the books stand: holds, calls and messages left open, runs, and the invariants where looking is cheap."""

from collections.abc import Iterator

from sqlalchemy import Connection, text

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.host.sql import render_statement
from trueup.monitoring.status import read_gauges
from trueup.reconcile.audit import OVERDUE_AFTER
from trueup.reconcile.missed_runs import find_missed_runs
from trueup.settings.settings import Settings
from trueup.usage.outbox import count_unresolved_effects

# A task that retries keeps its hold; none does so for a day.
OLD_HOLD_SECONDS = 86_400
SAMPLE = 200
"""So many balances are compared with the log; `trueup reconcile --deep` compares all."""


def check_holds(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield holds whose time is long over, and old ones."""
    figures = read_gauges(connection)
    open_holds, oldest = int(figures["holds_open"][0] or 0), figures["oldest_hold_seconds"][0]
    overdue = connection.scalar(
        text(
            "SELECT count(*) FROM trueup.hold "
            "WHERE status = 'open' AND expires_at < clock_timestamp() - make_interval(secs => :seconds)"
        ),
        {"seconds": OVERDUE_AFTER.total_seconds()},
    )
    detail = {"open": open_holds, "oldest_seconds": oldest, "overdue": overdue}
    if overdue:
        yield warning(
            "holds",
            f"{overdue} holds ran out more than {OVERDUE_AFTER.total_seconds() / 60:.0f} minutes ago, and nobody has "
            "ended them.",
            "See that beat and the worker of the queue trueup-reconcile run: trueup.expire_holds does it.",
            **detail,
        )
    elif oldest is not None and oldest > OLD_HOLD_SECONDS:
        yield warning(
            "holds",
            f"A hold has been open for {oldest / 3600:.0f} hours.",
            "Find its task: `trueup holds list`.",
            **detail,
        )
    else:
        age = "" if oldest is None else f", the oldest for {oldest:.0f} s"
        yield ok("holds", f"{open_holds} open holds{age}.", **detail)


def check_unresolved(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield calls that may have been billed unrecorded, and messages that may have been sent."""
    figures = read_gauges(connection)
    calls, bound = int(figures["unrecorded_calls"][0] or 0), int(figures["unrecorded_tokens_bound"][0] or 0)
    now = connection.execute(text("SELECT clock_timestamp()")).scalar_one()
    messages = count_unresolved_effects(connection, now)
    if calls:
        yield warning(
            "calls",
            f"{calls} calls of a provider were begun and never recorded; they may have cost up to {bound:,} tokens.",
            "Compare them with the provider's bill: `trueup status` lists them.",
            calls=calls,
            tokens_bound=bound,
        )
    else:
        yield ok("calls", "Every call that was begun has been recorded.", calls=0, tokens_bound=0)
    if messages:
        yield warning(
            "messages",
            f"{messages} messages may or may not have been sent.",
            "Look whether they were: `trueup status` lists them.",
            messages=messages,
        )
    else:
        yield ok("messages", "No message is in doubt.", messages=0)


def check_runs(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield runs that did not happen or failed, and what the newest left to people."""
    missed = find_missed_runs(connection)
    for gap in missed:
        yield error(
            "reconcile",
            gap.message,
            "See that beat and the worker of the queue trueup-reconcile run, or reconcile by hand: `trueup reconcile`.",
            **gap.content(),
        )
    run = connection.execute(
        text(
            "SELECT id, kind, status, error, in_review, defects, coalesce(finished_at, started_at) AS at "
            "FROM trueup.reconcile_run WHERE only_user IS NULL AND NOT dry_run ORDER BY id DESC LIMIT 1"
        )
    ).one_or_none()
    if run is None:
        if not missed:
            yield ok("reconcile", "No run over all users yet; the first one is not overdue.")
        return
    detail = {"run_id": run.id, "kind": run.kind, "status": run.status, "at": run.at.isoformat()}
    told = f"Run {run.id} ({run.kind}) {run.status} at {run.at:%Y-%m-%d %H:%M} UTC"
    if run.status == "failed":
        yield error("reconcile", f"{told}: {run.error}", f"`trueup drift report --run {run.id}` has more.", **detail)
    elif run.in_review:
        yield warning(
            "reconcile",
            f"{told}; {run.in_review} drifts wait for a person.",
            "Decide about them: `trueup drift review`.",
            **detail,
            in_review=run.in_review,
        )
    elif not missed:
        yield ok("reconcile", f"{told}.", **detail)


def check_beat(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield how long ago a schedule last had a run begun. One that is at work keeps others from beginning."""
    row = connection.execute(
        text(
            "SELECT extract(epoch FROM clock_timestamp() - coalesce(max(r.started_at), min(i.installed_at))) "
            "AS seconds, count(r.id) AS runs, coalesce(bool_or(r.status = 'running'), false) AS running "
            "FROM trueup.installation i "
            "LEFT JOIN trueup.reconcile_run r ON r.period IS NOT NULL OR r.status = 'running'"
        )
    ).one()
    seconds, limit = float(row.seconds), 2 * settings.reconcile_interval_seconds
    detail = {"seconds": round(seconds), "interval_seconds": settings.reconcile_interval_seconds, "runs": row.runs}
    if seconds <= limit or row.running:
        told = f"The schedule's last run began {seconds:.0f} s ago." if row.runs else "No scheduled run is due yet."
        yield ok("beat", told, **detail)
        return
    since = "since the setup" if not row.runs else "ago"
    yield error(
        "beat",
        f"The schedule's last run began {seconds:.0f} s {since}; one is due every "
        f"{settings.reconcile_interval_seconds} s.",
        "Start `celery -A trueup.worker beat`, and a worker for its queue: "
        "`celery -A trueup.worker worker -Q trueup-reconcile -n trueup-reconcile@%h`.",
        **detail,
    )


# I4, of all users: one look at the balances that hold something, and at the open holds.
_MISMATCHED_HOLDS = text(
    """
    SELECT count(*) AS users, min(CAST(user_id AS text)) AS example
    FROM (SELECT user_id, held FROM trueup.balance WHERE held <> 0) b
    FULL JOIN (SELECT user_id, sum(tokens_reserved - tokens_covered) AS tokens FROM trueup.hold
               WHERE status = 'open' GROUP BY user_id) h USING (user_id)
    WHERE coalesce(b.held, 0) <> coalesce(h.tokens, 0)
    """
)

# I1, of some: a balance that says itself that it is stale is rebuilt when next read, and no defect.
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


def check_invariants(connection: Connection, settings: Settings) -> Iterator[Finding]:
    """Yield balances that are not what their holds, or the log, add up to."""
    row = connection.execute(_MISMATCHED_HOLDS).one()
    if row.users:
        yield _mismatch(f"The tokens held of {row.users} users are not the sum of their open holds", "I4", row)
    else:
        yield ok("books", "The tokens held of every user are the sum of their open holds.", invariant="I4")
    # -1: not known, as before the first ANALYZE.
    rows = connection.scalar(text("SELECT reltuples FROM pg_class WHERE oid = to_regclass('trueup.balance')"))
    share = min(100.0, 200.0 * SAMPLE / rows) if rows and rows > 0 else 100.0
    statement = render_statement(_MISMATCHED_BALANCES, settings.host)
    row = connection.execute(statement, {"share": share, "most": SAMPLE}).one()
    if row.users:
        yield _mismatch(f"The balances of {row.users} of {row.looked_at} users are not the sum of their log", "I1", row)
    else:
        told = f"The balances of {row.looked_at} users, picked by chance, are the sums of their log."
        yield ok("books", told, invariant="I1", looked_at=row.looked_at)


def _mismatch(what: str, invariant: str, row: object) -> Finding:
    example = getattr(row, "example", None)
    return error(
        "books",
        f"{what}, of user {example} for one.",
        "Run `trueup reconcile --deep`: it repairs them, and reports why. Then look for what passed by the triggers.",
        invariant=invariant,
        users=getattr(row, "users", None),
        example=example,
    )
