"""The parts of the live page as HTML: each can be replaced by itself when its figures change."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jinja2 import Environment

from trueup.api.page.snapshot import DENIED_HOURS, Snapshot
from trueup.drift.causes import cause_title
from trueup.monitoring.at_risk import ACTIVE_WITHIN, AT_RISK_PERCENT
from trueup.monitoring.broker import BrokerState
from trueup.reports.chart import chart_of
from trueup.reports.display import compact, count_of, percent, show, signed

PACKAGE = "trueup.api.page"
# In the order of the page.
PARTS = ("notice", "summary", "review", "risk", "holds", "drift", "runs", "denials", "queues", "alerts")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a table. `href`: of a link. `kind`: its class; "number" stands right. `name`: of a link, in full."""

    text: str
    kind: str = ""
    href: str | None = None
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of a part. `empty`: the sentence without rows."""

    title: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    empty: str


def parts_of(
    pages: Environment, snapshot: Snapshot, broker: BrokerState | None, broker_problem: str | None
) -> dict[str, str]:
    """Return the HTML of each part. `broker` None: not known yet, or not for the reason `broker_problem`."""
    made: Any = pages.get_template("parts.html.jinja").module
    tables = {
        "review": _reviews(snapshot),
        "risk": _at_risk(snapshot),
        "holds": _holds(snapshot),
        "runs": _runs(snapshot),
        "denials": _denials(snapshot),
        "alerts": _alerts(snapshot),
    }
    return {
        "notice": str(made.notice(None, list(_warnings(snapshot)))),
        "summary": str(made.tiles(_tiles(snapshot))),
        "drift": str(made.drift(chart_of(snapshot.runs))),
        "queues": str(made.table(_queues(broker, broker_problem)))
        + str(made.workers(broker) if broker is not None else ""),
        **{name: str(made.table(table)) for name, table in tables.items()},
    }


def problem_part(pages: Environment, problem: str) -> dict[str, str]:
    """Return the part that says why there are no new figures."""
    made: Any = pages.get_template("parts.html.jinja").module
    return {"notice": str(made.notice(problem, []))}


def attention(snapshot: Snapshot) -> str:
    """Return what a screen reader is told when it changes: what waits for a person."""
    waiting = sum(alert.status != "sent" for alert in snapshot.alerts)
    parts = [f"{count_of(snapshot.in_review, 'drift')} in review"]
    parts += [f"{count_of(len(snapshot.at_risk), 'balance')} at risk"] if snapshot.at_risk else []
    parts += [f"{count_of(waiting, 'alert')} not received"] if waiting else []
    return ", ".join(parts) + "."


def _warnings(snapshot: Snapshot) -> Iterator[str]:
    yield from (missed.message for missed in snapshot.missed)
    calls, owed = int(snapshot.gauges["unrecorded_calls"] or 0), int(snapshot.gauges["owed_charges"] or 0)
    if calls:
        most = show(int(snapshot.gauges["unrecorded_tokens_bound"] or 0))
        yield (
            f"{count_of(calls, 'provider call')} began and never ended in trueup's books, for {most} tokens at most. "
            "`trueup status` lists them."
        )
    if owed:
        tokens = show(int(snapshot.gauges["owed_tokens"] or 0))
        yield (
            f"The usage log refused {count_of(owed, 'charge')} of {tokens} tokens. They count against the budgets. "
            "`trueup status` names the reason."
        )


def _tiles(snapshot: Snapshot) -> list[dict[str, str]]:
    gauges, last = snapshot.gauges, next((run for run in reversed(snapshot.runs) if run.finished_at), None)
    denied = sum(one.times - one.overridden for one in snapshot.denied)
    return [
        _tile("Balances at risk", len(snapshot.at_risk), "spending now, little left", bool(snapshot.at_risk)),
        _tile("Holds now", int(gauges["holds_open"] or 0), f"{compact(int(gauges['tokens_held'] or 0))} tokens"),
        _tile("Denied", denied, f"in {DENIED_HOURS} h"),
        _tile("In review", snapshot.in_review, "wait for a person", bool(snapshot.in_review)),
        _tile("Tokens overstated", last.tokens_overstated if last else 0, "by the last run", kind="over"),
        _tile("Tokens understated", last.tokens_understated if last else 0, "by the last run", kind="under"),
    ]


def _tile(label: str, count: int, note: str, attention: bool = False, kind: str = "") -> dict[str, str]:
    kind = "attention" if attention else kind
    return {"label": label, "figure": compact(count), "full": f"{count:,}", "note": note, "kind": kind}


def _text(value: Any, kind: str = "") -> Cell:
    return Cell(text=show(value), kind=kind)


def _number(value: int | None, kind: str = "number") -> Cell:
    return Cell(text="null" if value is None else show(value), kind=kind)


def _time(value: datetime | None) -> Cell:
    return Cell(text=show(value), kind="number")


def _reviews(snapshot: Snapshot) -> Table:
    left = snapshot.in_review - len(snapshot.reviews)
    more = f" {show(left)} more wait: `trueup drift review` lists them." if left > 0 else ""
    rows = [
        [
            Cell(text="Decide", href=f"/drifts/{item.id}", name=f"Decide about drift {item.id}"),
            _text(str(item.user_id)),
            Cell(text=signed(item.tokens), kind="number over" if item.tokens > 0 else "number under"),
            _text(cause_title(item.cause)),
            _text(item.certainty),
            _number(item.counter),
            _text("changed since: the next run looks again") if item.changed else _number(item.expected),
            _time(item.found_at),
        ]
        for item in snapshot.reviews
    ]
    return Table(
        title="Review queue",
        caption=f"Drifts that wait for a person, the oldest first. Times are UTC.{more}",
        headings=("Decision", "User", "Tokens", "Cause", "Certainty", "Counter", "Right value", "Since"),
        rows=rows,
        empty="No drift waits for a person.",
    )


def _at_risk(snapshot: Snapshot) -> Table:
    rows = [
        [
            _text(str(one.user_id)),
            Cell(text=signed(one.available) if one.available < 0 else show(one.available), kind="number"),
            Cell(text=percent(max(0, one.available) / one.original) if one.original else "–", kind="number"),
            _number(one.original),
            _number(one.consumed),
            _number(one.held),
            _number(one.counter),
        ]
        for one in snapshot.at_risk
    ]
    hours = int(ACTIVE_WITHIN.total_seconds() // 3600)
    return Table(
        title="Balances at risk",
        caption=f"Users with a hold, or a charge within {hours} h, who have less than {AT_RISK_PERCENT} % left",
        headings=("User", "Available", "Share", "Plan and grants", "Used", "Held", "Counter"),
        rows=rows,
        empty="No user who spends now is short of tokens.",
    )


def _holds(snapshot: Snapshot) -> Table:
    left = int(snapshot.gauges["holds_open"] or 0) - len(snapshot.holds)
    more = f"; {show(left)} more are open" if left > 0 else ""
    rows = [
        [
            _text(str(hold.user_id)),
            _text(hold.feature_name),
            _number(hold.tokens_left),
            _number(hold.tokens_charged),
            _number(hold.calls),
            _time(hold.opened_at),
            _time(hold.expires_at),
            _text(hold.task_id),
        ]
        for hold in snapshot.holds
    ]
    return Table(
        title="Holds now",
        caption=f"Tokens set aside for running work, the oldest first{more}. Times are UTC.",
        headings=("User", "Feature", "Held", "Charged", "Calls", "Opened", "Expires", "Task"),
        rows=rows,
        empty="No task holds tokens now.",
    )


def _denials(snapshot: Snapshot) -> Table:
    rows = [
        [
            _text(cause_title(one.reason)),
            _number(one.times - one.overridden),
            _number(one.overridden),
            _number(one.tokens),
            _number(one.users),
            _time(one.last_at),
        ]
        for one in snapshot.denied
    ]
    return Table(
        title="Denials by reason",
        caption=f"Tasks, blocks and streams of the last {DENIED_HOURS} h. Observed: the mode let them pass",
        headings=("Reason", "Denied", "Observed", "Tokens", "Users", "Last"),
        rows=rows,
        empty=f"The gate denied nothing in the last {DENIED_HOURS} h.",
    )


def _runs(snapshot: Snapshot) -> Table:
    rows = [
        [
            _text(run.id),
            _text(run.kind),
            _text(run.status + (f": {run.error}" if run.error else "")),
            _time(run.started_at),
            Cell(text="–" if run.seconds is None else f"{run.seconds:,.1f} s", kind="number"),
            _number(run.checked),
            _number(run.drifted),
            _number(run.corrected),
            _number(run.in_review),
        ]
        for run in reversed(snapshot.runs[-10:])
    ]
    return Table(
        title="Reconcile runs",
        caption="The newest runs over all users. Times are UTC.",
        headings=("Run", "Kind", "Status", "Started", "Took", "Checked", "Drifted", "Corrected", "In review"),
        rows=rows,
        empty="There has been no reconcile run yet. `trueup reconcile` starts one.",
    )


def _queues(broker: BrokerState | None, problem: str | None) -> Table:
    rows = [
        [
            _text(queue.name),
            _number(queue.length),
            Cell(text="–" if queue.oldest_seconds is None else f"{queue.oldest_seconds:,.0f} s", kind="number"),
            Cell(text=show(queue.workers), kind="number" if queue.workers else "number attention"),
        ]
        for queue in (broker.queues if broker else ())
    ]
    return Table(
        title="Queues and workers",
        caption="Messages that wait, how long the oldest has been due, and the workers that consume the queue",
        headings=("Queue", "Waiting", "Oldest", "Workers"),
        rows=rows,
        empty=problem or "The workers are being asked. Their answers appear here within seconds.",
    )


def _alerts(snapshot: Snapshot) -> Table:
    rows = [
        [
            _text(alert.kind.replace("_", " ")),
            _text(alert.payload.get("data", {}).get("message", "")),
            _text(alert.channel),
            _text(alert.status, "" if alert.status == "sent" else "attention"),
            _time(alert.created_at),
        ]
        for alert in snapshot.alerts
    ]
    return Table(
        title="Alerts",
        caption="The newest alerts. Times are UTC.",
        headings=("Alert", "What", "Channel", "Status", "Raised"),
        rows=rows,
        empty="There are no alerts.",
    )
