"""Reconcile runs: one at a time, each a row with a lease. Its figures are counted from the rows that it wrote."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.drift.action import Verdict
from trueup.drift.causes import Explanation
from trueup.drift.detect import Drift
from trueup.errors import TrueupError
from trueup.reconcile.audit import Defect
from trueup.reconcile.shards import LEASE_SECONDS, MAX_FAILURES
from trueup.settings.policies import Rules

RunKind = Literal["quick", "deep"]

# An interrupted run can be resumed for this long. After that, its checks are too old.
RESUME_SECONDS: dict[RunKind, int] = {"quick": 900, "deep": 6 * 3600}

KEPT_FINDINGS = 10_000
"""The maximum number of findings, and of defects, in a summary."""

_COUNTED = (
    *("checked", "drifted", "corrected", "tokens_overstated", "tokens_understated", "tokens_explained"),
    *("found_new", "in_review", "defects"),
)


class RunInProgressError(TrueupError):
    """Another reconcile run is in progress on this database; this one did nothing."""

    def __init__(self) -> None:
        super().__init__(
            "Another reconcile run is in progress on this database, so this one did nothing. Wait until it ends, then "
            "try again. `trueup drift history` lists the runs."
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A drift, its explanation, the verdict on it, and the action taken: corrected, reported, review, lost_race, …

    `written`: the corrected counter; None: the counter was not changed. `is_new` False: an earlier run recorded the
    drift, and this run updated that row. `is_remainder`: the components that a correction of the same counter, which is
    the finding before this one, has left.
    """

    drift: Drift
    explanation: Explanation
    verdict: Verdict
    action: str
    written: int | None
    is_new: bool = True
    is_remainder: bool = False


@dataclass(kw_only=True)
class RunSummary:
    """The figures of a run. `run_id` None: a dry run, which has no row. Token figures are counts.

    `tokens_proven`, `tokens_inferred`: those of the explained tokens whose causes are all proven, or at least inferred.
    `resumed`: the run continued an interrupted one. `findings` (if requested) and `defect_rows` (of a dry run) have at
    most `KEPT_FINDINGS` entries.
    """

    run_id: int | None
    dry_run: bool
    started_at: datetime
    finished_at: datetime | None = None
    kind: RunKind = "quick"
    status: str = "running"
    resumed: bool = False
    checked: int = 0
    drifted: int = 0
    corrected: int = 0
    tokens_overstated: int = 0
    tokens_understated: int = 0
    tokens_explained: int = 0
    tokens_proven: int = 0
    tokens_inferred: int = 0
    found_new: int = 0
    in_review: int = 0
    defects: int = 0
    findings: list[Finding] = field(default_factory=list)
    defect_rows: list[Defect] = field(default_factory=list)

    def add(self, checked: int, findings: Sequence[Finding]) -> None:
        self.checked += checked
        self.drifted += sum(not finding.is_remainder for finding in findings)
        self.corrected += sum(finding.action == "corrected" for finding in findings)
        self.found_new += sum(finding.is_new for finding in findings)
        self.in_review += sum(finding.action == "review" for finding in findings)
        self.tokens_overstated += sum(max(0, finding.drift.tokens) for finding in findings)
        self.tokens_understated += sum(max(0, -finding.drift.tokens) for finding in findings)
        for finding in findings:
            explained = finding.explanation.tokens_explained(finding.drift)
            self.tokens_explained += explained
            self.tokens_proven += explained if finding.explanation.certainty == "proven" else 0
            self.tokens_inferred += explained if finding.explanation.certainty == "inferred" else 0

    def keep(self, findings: Sequence[Finding]) -> None:
        self.findings.extend(findings[: KEPT_FINDINGS - len(self.findings)])

    def add_defects(self, defects: Sequence[Defect]) -> None:
        self.defects += len(defects)
        self.defect_rows.extend(defects[: KEPT_FINDINGS - len(self.defect_rows)])


@dataclass(frozen=True, kw_only=True)
class BegunRun:
    """A run that belongs to the caller now. `resumed`: it was interrupted before."""

    run_id: int
    resumed: bool


def rules_as_json(rules: Rules) -> str:
    """Return the rules as JSON, as stored in a run's row."""
    return json.dumps({**asdict(rules), "policies": dict(rules.policies)}, sort_keys=True)


_BEGIN = text(
    """
    SELECT * FROM trueup.begin_run(
        :kind, make_interval(secs => :every), make_interval(secs => :offset), CAST(:only_user AS text),
        CAST(:rules AS jsonb), :requested_by, :owner, make_interval(secs => :lease), make_interval(secs => :resume),
        CAST(:shard_size AS bigint))
    """
)


def begin_run(
    connection: Connection,
    *,
    kind: RunKind,
    rules: Rules,
    owner: str,
    requested_by: str,
    only_user: UserId | None = None,
    shard_size: int | None = None,
    every_seconds: int | None = None,
    offset_seconds: int = 0,
) -> BegunRun | None:
    """Begin a run, or resume an interrupted one of the same kind, rules and users.

    `owner`: name from `new_owner`, for the lease. `only_user` None: all users. `shard_size`: subscriptions in a shard;
    None: one shard. `every_seconds`: the run belongs to the current period of this length, counted from
    `offset_seconds` after midnight UTC; None: it belongs to no period. Returns None if this period has had its run.
    A `shard_size` makes it read all subscriptions, so pass a connection of `long_read`. Raises `RunInProgressError`.
    """
    begun = connection.execute(
        _BEGIN,
        {
            "kind": kind,
            "every": every_seconds,
            "offset": offset_seconds,
            "only_user": None if only_user is None else str(only_user),
            "rules": rules_as_json(rules),
            "requested_by": requested_by,
            "owner": owner,
            "lease": LEASE_SECONDS,
            "resume": RESUME_SECONDS[kind],
            "shard_size": shard_size,
        },
    ).one()
    if begun.refused == "busy":
        raise RunInProgressError
    return None if begun.refused else BegunRun(run_id=begun.run_id, resumed=begun.resumed)


def refuse_beside_a_run(connection: Connection) -> None:
    """Raise `RunInProgressError` while a run is in progress: a dry run would report only a part of its changes."""
    busy = connection.scalar(
        text("SELECT bool_or(trueup.run_is_alive(r.id)) FROM trueup.reconcile_run r WHERE r.status = 'running'")
    )
    connection.rollback()
    if busy:
        raise RunInProgressError


def end_run(
    connection: Connection,
    run_id: int,
    *,
    status: str | None = None,
    error: str | None = None,
    owner: str | None = None,
) -> bool:
    """End a run. Returns False if it has ended before, or if shards are left and `status` is None.

    `status` None: derived from the shards' status. `error`: the reason of a failure. `owner`: end the run only if it
    still belongs to this owner; None: always.
    """
    ended = connection.scalar(
        text("SELECT trueup.end_run(:run_id, CAST(:status AS text), CAST(:error AS text), CAST(:owner AS text))"),
        {"run_id": run_id, "status": status, "error": error, "owner": owner},
    )
    connection.rollback()
    return bool(ended)


_FIGURES = ("run_id", "dry_run", "started_at", "finished_at", "kind", "status", *_COUNTED)


def read_summary(connection: Connection, run_id: int) -> RunSummary:
    """Return the current figures of a run, without findings."""
    row: Any = connection.execute(
        text("SELECT *, id AS run_id FROM trueup.reconcile_run WHERE id = :run_id"), {"run_id": run_id}
    ).one()
    connection.rollback()
    return RunSummary(**{name: getattr(row, name) for name in _FIGURES})


def runs_by(connection: Connection, run_id: int, rules: Rules) -> bool:
    """Return whether the run was planned under these rules; another process may have other settings."""
    same = connection.scalar(
        text("SELECT rules = CAST(:rules AS jsonb) FROM trueup.reconcile_run WHERE id = :run_id"),
        {"run_id": run_id, "rules": rules_as_json(rules)},
    )
    connection.rollback()
    return bool(same)


_SWEEP = text("SELECT * FROM trueup.sweep_runs(CAST(:rules AS jsonb), make_interval(secs => :lease), :most)")


def sweep_runs(connection: Connection, rules: Rules, *, lease_seconds: float) -> list[tuple[int, int]]:
    """End the runs whose shards have all ended; return the abandoned shards of all other runs as (run, number).

    Only runs planned under `rules` are swept: a process must not continue a run that allows other corrections.
    `lease_seconds`: the new lease of each run that is not ended.
    """
    values = {"rules": rules_as_json(rules), "lease": lease_seconds, "most": MAX_FAILURES}
    return [(row.run_id, row.number) for row in connection.execute(_SWEEP, values)]
