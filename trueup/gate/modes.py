"""The mode of the gate for each feature. A row in the database takes precedence over the settings."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import get_args

from sqlalchemy import Connection, text

from trueup.accounts.user_ids import UserId
from trueup.accounts.validation import check_text
from trueup.errors import InvalidInputError
from trueup.settings.gate import GateMode
from trueup.settings.settings import get_settings

EVERY_FEATURE = "*"
_MAX_NAME = 200


@dataclass(frozen=True, kw_only=True)
class FeatureMode:
    """A feature and its mode. `source`: "run time" (a row in the database) or "settings".

    `denied`, `denied_tokens`, `denied_users`: counts of the overridden denials in the requested time, of the tokens
    that they asked for, and of their users.
    """

    feature_name: str
    mode: GateMode
    source: str
    denied: int
    denied_tokens: int
    denied_users: int


@dataclass(frozen=True, kw_only=True)
class ModeChange:
    """A change at run time. `mode` None: the settings decide from then on. `mode_before` None: they decided before."""

    feature_name: str
    mode_before: GateMode | None
    mode: GateMode | None
    changed_by: str
    note: str
    changed_at: datetime


@dataclass(frozen=True, kw_only=True)
class ObservedDenial:
    """The overridden denials of one feature for one reason. `tokens`: the sum of the requested tokens."""

    feature_name: str
    reason: str
    times: int
    tokens: int
    users: int
    last_at: datetime


_SET = text("SELECT trueup.set_gate_mode(:feature_name, :mode, :changed_by, :note, CAST(:now AS timestamptz))")


def set_mode(
    connection: Connection,
    feature_name: str,
    mode: str | None,
    *,
    changed_by: str,
    note: str,
    now: datetime | None = None,
) -> GateMode | None:
    """Set the mode of a feature from now on, and record who changed it and why.

    `feature_name`: "*" means every feature without a mode of its own. `mode`: None removes the row, so that the
    settings decide. Returns the previous mode, None if there was none. Raises `InvalidInputError` for an unknown mode
    or a malformed name or note.
    """
    if mode is not None and mode not in get_args(GateMode):
        raise InvalidInputError(f"mode: {mode!r} is unknown. Use one of {', '.join(get_args(GateMode))}.")
    values = {
        "feature_name": check_text("feature", feature_name, most=_MAX_NAME),
        "mode": mode,
        "changed_by": check_text("by", changed_by, most=_MAX_NAME),
        "note": check_text("note", note, most=2000),
        "now": now,
    }
    before: GateMode | None = connection.execute(_SET, values).scalar_one()
    return before


_FEATURES = text(
    """
    WITH seen AS (
        SELECT d.feature_name, count(*) AS denied, sum(d.tokens)::bigint AS tokens, count(DISTINCT d.user_id) AS users
        FROM trueup.observed_denial d WHERE d.denied_at >= clock_timestamp() - CAST(:since AS interval) GROUP BY 1
    ), passed AS (
        SELECT h.feature_name FROM trueup.charge c
        JOIN trueup.hold h ON h.user_id = c.user_id AND h.task_id = c.task_id AND h.id = c.hold_id
        WHERE c.charged_at >= clock_timestamp() - CAST(:since AS interval)
        UNION SELECT h.feature_name FROM trueup.hold h WHERE h.status = 'open'
    )
    SELECT n.feature_name, trueup.gate_mode_of(n.feature_name, NULL) AS mode, coalesce(s.denied, 0) AS denied,
           coalesce(s.tokens, 0) AS denied_tokens, coalesce(s.users, 0) AS denied_users
    FROM (SELECT feature_name FROM trueup.gate_mode UNION SELECT feature_name FROM seen
          UNION SELECT feature_name FROM passed UNION SELECT unnest(CAST(:names AS text[]))) n
    LEFT JOIN seen s USING (feature_name)
    ORDER BY n.feature_name = '*' DESC, n.feature_name
    """
)


def list_modes(connection: Connection, *, known: list[str], hours: int = 24) -> list[FeatureMode]:
    """Return the modes of all features that have a mode of their own, or passed the gate lately, or are in `known`.

    A host's views and tasks have features that only their gate names. `hours`: how far back denials and
    charges count; open holds always do.
    """
    gate = get_settings().gate
    names = [EVERY_FEATURE, *gate.modes, *known]
    rows = connection.execute(_FEATURES, {"names": names, "since": timedelta(hours=hours)})
    return [
        FeatureMode(
            feature_name=row.feature_name,
            mode=row.mode or gate.mode_of(row.feature_name),
            source="run time" if row.mode else "settings",
            denied=row.denied,
            denied_tokens=row.denied_tokens,
            denied_users=row.denied_users,
        )
        for row in rows
    ]


_CHANGES = text(
    """
    SELECT feature_name, mode_before, mode, changed_by, note, changed_at FROM trueup.gate_mode_change
    ORDER BY id DESC LIMIT :limit
    """
)


def list_changes(connection: Connection, *, limit: int = 50) -> list[ModeChange]:
    """Return the changes at run time, newest first."""
    return [ModeChange(**row) for row in connection.execute(_CHANGES, {"limit": limit}).mappings()]


_DENIALS = text(
    """
    SELECT feature_name, reason, count(*) AS times, sum(tokens)::bigint AS tokens, count(DISTINCT user_id) AS users,
           max(denied_at) AS last_at
    FROM trueup.observed_denial WHERE denied_at >= clock_timestamp() - CAST(:since AS interval)
    GROUP BY 1, 2 ORDER BY times DESC, 1, 2
    """
)


def list_observed_denials(connection: Connection, *, hours: int = 24) -> list[ObservedDenial]:
    """Return the overridden denials of the last `hours` by feature and reason, the most frequent first."""
    return [ObservedDenial(**row) for row in connection.execute(_DENIALS, {"since": timedelta(hours=hours)}).mappings()]


@dataclass(frozen=True, kw_only=True)
class DeniedTasks:
    """What the gate denied or, in mode "observe", would have denied, for one reason.

    These are tasks, blocks, streams, extensions of holds, and views that `require_ai_tokens` guards.

    `overridden`: how many of `times` were only observed. `tokens`: the sum of the requested tokens.
    """

    reason: str
    times: int
    overridden: int
    tokens: int
    users: int
    last_at: datetime


_DENIED = text(
    """
    SELECT t.reason, count(*) AS times, count(*) FILTER (WHERE t.overridden) AS overridden,
           sum(t.tokens)::bigint AS tokens, count(DISTINCT t.user_id) AS users, max(t.denied_at) AS last_at
    FROM (
        (SELECT user_id, reason, tokens, denied_at, false AS overridden FROM trueup.denial
         WHERE denied_at >= clock_timestamp() - CAST(:since AS interval) ORDER BY denied_at DESC LIMIT :most)
        UNION ALL
        (SELECT user_id, reason, tokens, denied_at, true FROM trueup.observed_denial
         WHERE denied_at >= clock_timestamp() - CAST(:since AS interval) ORDER BY denied_at DESC LIMIT :most)
    ) t
    GROUP BY t.reason ORDER BY times DESC, t.reason
    """
)


def list_denied_tasks(connection: Connection, *, hours: int = 24, most: int = 10_000) -> list[DeniedTasks]:
    """Return the denials of the last `hours` by reason, the most frequent first. `most`: only the newest count."""
    values = {"since": timedelta(hours=hours), "most": most}
    return [DeniedTasks(**row) for row in connection.execute(_DENIED, values).mappings()]


_MODE = text("SELECT trueup.gate_mode_of(:feature_name, :mode)")


def mode_of(connection: Connection, feature_name: str) -> GateMode:
    """Return the current mode of a feature."""
    settings = get_settings().gate.mode_of(feature_name)
    mode: GateMode = connection.execute(_MODE, {"feature_name": feature_name, "mode": settings}).scalar_one()
    return mode


_OVERRIDE = text(
    "SELECT trueup.override_denial(:user_id, :task_id, :feature_name, :mode, :reason, :tokens, "
    "CAST(:now AS timestamptz))"
)


def overrides_denial(
    connection: Connection,
    user_id: UserId,
    *,
    feature_name: str,
    reason: str,
    tokens: int,
    task_id: str = "",
    now: datetime | None = None,
) -> bool:
    """Return whether the feature's mode overrides a denial. The denial is recorded, except in mode "off".

    For checks without a hold: `open_hold` does this itself. `reason`: the code of the denial. `tokens`: the requested
    count. `task_id`: "" means that there is no task. `now`: None means the database's clock.
    """
    values = {
        "user_id": user_id,
        "task_id": task_id,
        "feature_name": feature_name,
        "mode": get_settings().gate.mode_of(feature_name),
        "reason": reason,
        "tokens": tokens,
        "now": now,
    }
    overridden: bool = connection.execute(_OVERRIDE, values).scalar_one()
    return overridden


_PRUNE = text(
    """
    WITH overridden AS (
        DELETE FROM trueup.observed_denial WHERE (user_id, id) IN (
            SELECT user_id, id FROM trueup.observed_denial
            WHERE denied_at < clock_timestamp() - CAST(:older_than AS interval) LIMIT :limit) RETURNING 1
    ), denied AS (
        DELETE FROM trueup.denial WHERE (user_id, id) IN (
            SELECT user_id, id FROM trueup.denial
            WHERE denied_at < clock_timestamp() - CAST(:older_than AS interval) LIMIT :limit) RETURNING 1
    )
    SELECT (SELECT count(*) FROM overridden) + (SELECT count(*) FROM denied)
    """
)


def prune_denials(connection: Connection, *, older_than: timedelta, limit: int) -> int:
    """Delete denials older than `older_than`, at most `limit` overridden and as many others. Returns how many."""
    return int(connection.execute(_PRUNE, {"older_than": older_than, "limit": limit}).scalar_one())
