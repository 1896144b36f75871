"""A history of reconcile runs and drifts, as runs would have written it, for tests of the reports on it."""

import json
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.support.host import Host

FIRST_RUN = datetime(2024, 11, 2, 2, tzinfo=UTC)
"""The start of the first run. Each later run starts a day after the one before."""

_RUN = """
    INSERT INTO trueup.reconcile_run (dry_run, status, only_user, kind, started_at, finished_at, checked, drifted,
                                      corrected, found_new, in_review, tokens_overstated, tokens_understated,
                                      tokens_explained, defects, error)
    VALUES (false, :status, :only_user, :kind, :started_at, :finished_at, :checked, :drifted, :corrected, :found_new,
            :in_review, :tokens_overstated, :tokens_understated, :tokens_explained, :defects, :error)
    RETURNING id
"""

_DRIFT = """
    INSERT INTO trueup.drift (user_id, run_id, subscription_id, observed, expected, written, cause, action, evidence,
                              found_at, certainty, tokens_explained, reason, last_run_id, last_seen_at)
    VALUES (:user_id, :run_id, '1', :observed, :expected, :written, :cause, :action, CAST(:evidence AS jsonb),
            :found_at, :certainty, :tokens_explained, :reason, :run_id, :found_at)
    RETURNING id
"""

_STAND = "UPDATE trueup.drift SET last_run_id = :run_id, last_seen_at = :seen_at WHERE id = :id"


def add_run(host: Host, *, started_at: datetime | None = None, **figures: Any) -> int:
    """Insert a finished run over all users, a day after the last one. Returns its number."""
    runs = host.value("SELECT count(*) FROM trueup.reconcile_run")
    began = started_at or FIRST_RUN + timedelta(days=runs)
    names = ("checked", "drifted", "corrected", "found_new", "in_review", "defects")
    tokens = ("tokens_overstated", "tokens_understated", "tokens_explained")
    values = dict.fromkeys((*names, *tokens), 0) | {"status": "finished", "kind": "quick"}
    values |= {"only_user": None, "error": None, "started_at": began, "finished_at": began + timedelta(seconds=4)}
    run_id: int = host.value(_RUN, **values | figures)
    return run_id


def add_drift(
    host: Host,
    run_id: int,
    user_id: Any,
    observed: int | None,
    expected: int,
    *parts: tuple[str, int],
    action: str = "corrected",
    certainty: str = "possible",
    reason: str = "policy",
) -> int:
    """Insert a drift that a run found, with its causes and their tokens. Returns its number."""
    drift: int = host.value(
        _DRIFT,
        user_id=user_id,
        run_id=run_id,
        observed=observed,
        expected=expected,
        written=expected if action == "corrected" else None,
        cause="+".join(cause for cause, _ in parts) or "unexplained",
        action=action,
        evidence=json.dumps(
            {"components": [{"cause": cause, "tokens": tokens, "certainty": certainty} for cause, tokens in parts]}
        ),
        found_at=host.value("SELECT started_at FROM trueup.reconcile_run WHERE id = :id", id=run_id),
        certainty=certainty,
        tokens_explained=min(abs((observed or 0) - expected), abs(sum(tokens for _, tokens in parts))),
        reason=reason,
    )
    return drift


def see_again(host: Host, drift_id: int, run_id: int) -> None:
    """Record that a later run saw the same drift unchanged."""
    seen_at = host.value("SELECT started_at FROM trueup.reconcile_run WHERE id = :id", id=run_id)
    host.execute(_STAND, id=drift_id, run_id=run_id, seen_at=seen_at)


def decide(host: Host, drift_id: int, decision: str) -> None:
    """Record a person's decision about a drift."""
    host.execute(
        "INSERT INTO trueup.drift_decision (user_id, drift_id, decision, decided_by, note, counter_before, "
        "counter_after, decided_at) SELECT user_id, id, :decision, 'sam', 'asked the customer', observed, observed, "
        "last_seen_at + interval '1 hour' FROM trueup.drift WHERE id = :id",
        id=drift_id,
        decision=decision,
    )
