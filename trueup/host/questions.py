"""Questions about a host that its rows raise and its mapping does not answer. A wrong guess would change counters.

Each is asked once: the setting that answers it ends it. Reads a sample of the host's rows, and writes nothing.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from trueup.host.catalog import Column, local_times, mapped_columns
from trueup.host.mapping import HostMapping
from trueup.host.setting_values import Expression
from trueup.host.sql import render_statement

SAMPLE_ROWS = 100_000
SAMPLE_USERS = 200
# Without an index, the usage of a few users may take long to add up. The question is then left open.
SAMPLE_MILLISECONDS = 2_000
# How far the log's newest time may lie ahead of now: more is another zone, not a clock that is wrong.
CLOCK_TOLERANCE = timedelta(minutes=10)


@dataclass(frozen=True, kw_only=True)
class Question:
    """`setting`: what to set. `what`: what the rows show. `remedy`: the possible answers.

    `is_blocking`: with the present setting, trueup would change counters to wrong values, so it is not attached.
    """

    setting: str
    what: str
    remedy: str
    is_blocking: bool = False


def open_questions(connection: Connection, mapping: HostMapping, *, is_way_said: bool = True) -> list[Question]:
    """Return the questions that the host's rows raise. A question whose rows the role may not read is left out.

    `is_way_said` False: a name, and no person, says which way the counter counts.
    """
    driver: Any = connection.connection.driver_connection
    if driver.autocommit:  # each question is tried in a savepoint
        with connection.engine.begin() as own:
            return open_questions(own, mapping, is_way_said=is_way_said)
    found = []
    for ask in (_which_zone, _which_plans, _unlimited, _which_way):
        trial = connection.begin_nested()
        try:
            connection.execute(text(f"SET LOCAL statement_timeout = {SAMPLE_MILLISECONDS}"))
            question = ask(mapping, Reader(connection=connection, mapping=mapping, is_way_said=is_way_said))
        except DBAPIError:
            if connection.invalidated:
                raise
            question = None
        finally:
            trial.rollback()
        found += [question] if question else []
    return found


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Reads the one row of a question's statement."""

    connection: Connection
    mapping: HostMapping
    is_way_said: bool

    def __call__(self, template: str, *, names: dict[str, Any] | None = None, **values: Any) -> Any:
        """Return the row. `names`: further names for the template; `values`: the statement's parameters."""
        return self.connection.execute(render_statement(template, self.mapping, **names or {}), values).one()

    def local_columns(self) -> list[Column]:
        """Return the mapped columns with times without a zone."""
        return list(local_times(mapped_columns(self.connection, self.mapping), self.mapping))


# `server`: the zone of sessions that set none; trueup's set their own, and would be reset to this. `ahead`: how far the
# log's newest time lies in the future, if it is read as UTC.
_ZONES = """
    SELECT z.reset_val AS server,
           EXISTS (SELECT FROM unnest(ARRAY[1, 4, 7, 10]) AS m (month)
                   WHERE (make_timestamptz(2024, m.month, 1, 0, 0, 0, 'UTC') AT TIME ZONE z.reset_val)
                         <> make_timestamp(2024, m.month, 1, 0, 0, 0)) AS is_other,
           {% if is_logged %}
           (SELECT max(l.{{ usage_log.created_at }}) FROM {{ usage_log }} l)
               - (clock_timestamp() AT TIME ZONE 'UTC') AS ahead
           {% else %}
           NULL AS ahead
           {% endif %}
    FROM pg_settings z WHERE z.name = 'TimeZone'
"""


def _which_zone(mapping: HostMapping, read: Reader) -> Question | None:
    if mapping.time_zone is not None:
        return None
    columns = read.local_columns()
    if not columns:
        return None
    # No call is logged before it is made. Other times, such as the start of a subscription, may lie ahead.
    is_logged = any((column.noun, column.field) == ("usage_log", "created_at") for column in columns)
    row = read(_ZONES, names={"is_logged": is_logged})
    is_ahead = row.ahead is not None and row.ahead > CLOCK_TOLERANCE
    if not row.is_other and not is_ahead:
        return None
    names = ", ".join(f"{column.table}.{column.name}" for column in columns)
    hints = [f"The server's sessions are in {row.server}"] if row.is_other else []
    hints += [f"the log's newest time lies {_hours(row.ahead)} ahead of now in UTC"] if is_ahead else []
    example = row.server if row.is_other else "Asia/Tehran"
    return Question(
        setting="host.time_zone",
        what=f"{names} have no time zone, and trueup reads them as UTC. {' and '.join(hints)}",
        remedy=f'set time_zone under [host] to the zone of these times ("{example}", for example), or to "UTC" if they '
        "are UTC",
        is_blocking=True,
    )


def _hours(ahead: timedelta) -> str:
    minutes = round(ahead.total_seconds() / 60)
    return f"{minutes // 60}:{minutes % 60:02} h"


_BOTH_PLANS = """
    SELECT count(*) AS users FROM (
        SELECT {{ subscription.token_plan_id("s") }} IS NOT NULL
               AND {{ subscription.full_plan_id("s") }} IS NOT NULL AS has
        FROM {{ subscription }} s LIMIT :rows) sample
    WHERE has
"""


def _which_plans(mapping: HostMapping, read: Reader) -> Question | None:
    names = mapping.subscription
    is_one_kind = names.token_plan_id == names.full_plan_id or None in (
        mapping.token_plan.table,
        mapping.full_plan.table,
    )
    if is_one_kind or names.plans is not None or names.tokens_included is not None:
        return None
    users = read(_BOTH_PLANS, rows=SAMPLE_ROWS).users
    if not users:
        return None
    return Question(
        setting="host.subscription.tokens_included",
        what=f"Some subscriptions ({users}) have a token plan and a full plan. trueup counts the token plan alone",
        remedy='set tokens_included = "sum" if both plans count, or "first" if the token plan counts alone',
    )


_NEGATIVE = """
    {% from "host/rows.sql" import has_negative_plan %}
    SELECT count(*) AS users FROM (
        SELECT {{ has_negative_plan() }} AS has
        FROM {{ subscription }} s
        LEFT JOIN {{ token_plan }} tp ON tp.{{ token_plan.id }} = {{ subscription.token_plan_id("s") }}
        LEFT JOIN {{ full_plan }} fp ON fp.{{ full_plan.id }} = {{ subscription.full_plan_id("s") }}
        LIMIT :rows) sample
    WHERE has
"""


def _unlimited(mapping: HostMapping, read: Reader) -> Question | None:
    names = mapping.subscription
    if names.unlimited is not None or isinstance(names.tokens_included, Expression):
        return None
    users = read(_NEGATIVE, rows=SAMPLE_ROWS).users
    if not users:
        return None
    return Question(
        setting="host.subscription.unlimited",
        what=f"Some subscriptions ({users}) include a number of tokens below 0. trueup lets them use none",
        remedy="set unlimited = -1 if that value means no limit, or correct the plans",
    )


# `up`: the counter equals the used tokens; `down`: it equals the tokens left.
_WAY = """
    {% from "host/rows.sql" import is_counted, plan_tokens, window_start %}
    SELECT count(*) FILTER (WHERE c.counter = u.tokens) AS up,
           count(*) FILTER (WHERE c.counter = greatest(c.included - u.tokens, 0)) AS down
    FROM (
        SELECT s.{{ subscription.user_id }} AS user_id, s.{{ subscription.tokens_remaining }} AS counter,
               {{ plan_tokens() }} AS included, {{ window_start("s") }} AS since
        FROM {{ subscription }} s
        LEFT JOIN {{ token_plan }} tp ON tp.{{ token_plan.id }} = {{ subscription.token_plan_id("s") }}
        LEFT JOIN {{ full_plan }} fp ON fp.{{ full_plan.id }} = {{ subscription.full_plan_id("s") }}
        WHERE s.{{ subscription.tokens_remaining }} > 0
        LIMIT :users) c
    CROSS JOIN LATERAL (SELECT sum(l.{{ usage_log.total_tokens }}) AS tokens FROM {{ usage_log }} l
                        WHERE {{ is_counted("l", "c.user_id", "c.since") }} OFFSET 0) u
    WHERE u.tokens > 0
"""


def _which_way(mapping: HostMapping, read: Reader) -> Question | None:
    names = mapping.subscription
    if names.counts is not None and read.is_way_said:
        return None
    votes = read(_WAY, users=SAMPLE_USERS)
    counts_up = names.counts == "up"
    if (votes.down <= votes.up) if counts_up else (votes.up <= votes.down):
        return None
    return Question(
        setting="host.subscription.counter",
        what=f"{names.table}.{names.tokens_remaining} equals the used tokens of {votes.up} users, and the tokens left "
        f"of {votes.down}. trueup reads it as {'used tokens' if counts_up else 'the tokens left'}",
        remedy=f'set counter = {{column = "{names.tokens_remaining}", counts = "up"}} if it shows used tokens, or '
        'counts = "down" if it shows the tokens left',
        is_blocking=True,
    )
