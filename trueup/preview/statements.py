"""The statements of a look: the page of users, what drifts in it, and the evidence for that.

They are made of the same pieces of SQL as the functions that a reconcile run calls. No function of trueup's is needed,
and where trueup is not set up, its tables are read as empty.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from sqlalchemy import TextClause
from sqlalchemy.dialects import postgresql

from trueup.accounts.user_ids import UserId
from trueup.database.schema import SCHEMA, build_metadata
from trueup.host.mapping import HostMapping, UserIdType
from trueup.host.sql import INSTALLED, OwnTables, fields_read, render_statement
from trueup.preview.checks import Named, named_columns
from trueup.reconcile.shards import conditions_of

_PAGE = """
    SELECT count(*) AS counters, count(DISTINCT p.user_id) AS users,
           (array_agg(p.user_id ORDER BY p.user_id DESC))[1] AS last, statement_timestamp() AS at
    FROM (SELECT s.{{ subscription.user_id }} AS user_id FROM {{ subscription }} s
          WHERE s.{{ subscription.user_id }} IS NOT NULL{{ within("s." ~ subscription.user_id) }}
          ORDER BY s.{{ subscription.user_id }} LIMIT CAST(:page AS bigint)) p
"""
# By subscription, so that a sum is of its own window. A window that is none began whenever.
_DRIFTED = """
    {% from "accounts/entitlements.sql" import entitlements %}
    {% from "host/rows.sql" import used_in_windows %}
    SELECT e.user_id, e.subscription_id, coalesce(e.is_active, false) AS is_active, e.end_date, e.original,
           e.counter AS observed,
           CAST(e.window_start AS text) AS window, coalesce(u.tokens, 0) AS consumed,
           greatest(e.original - coalesce(u.tokens, 0), 0) AS expected
    FROM ({{ entitlements("CAST(:at AS timestamptz)") }}) e
    LEFT JOIN (
        {{ used_in_windows("w." ~ subscription.id, within("l." ~ usage_log.user_id)) }}
    ) u ON CAST(u.key AS text) = e.subscription_id
    WHERE e.user_id IS NOT NULL{{ within("e.user_id") }}
      AND (e.counter IS DISTINCT FROM greatest(e.original - coalesce(u.tokens, 0), 0) OR u.tokens = {{ uncountable }})
"""
_EVIDENCE = """
    {% from "drift/evidence_query.sql" import evidence %}
    WITH wanted AS (
        SELECT * FROM unnest(
            CAST(:users AS {{ user_id_type }}[]), CAST(:subscriptions AS text[]), CAST(:windows AS timestamptz[]),
            CAST(:original AS bigint[]), CAST(:consumed AS bigint[]), CAST(:observed AS bigint[]))
            AS w (user_id, subscription_id, window_start, original, consumed, observed)
    ), {{ evidence("CAST(:at AS timestamptz)", "make_interval(secs => :min_age)") }}
"""
_PLAN_SIZES = '{% from "drift/purchases.sql" import plan_sizes %}{{ plan_sizes() }}'
_COUNTER_LIMIT = '{% from "drift/limits.sql" import counter_limit %}{{ counter_limit() }}'


@dataclass(frozen=True)
class EmptyTables(OwnTables):
    """trueup's own tables in a database without them: each is a subquery with its columns and no row."""

    user_id_type: UserIdType
    installed = False

    def __getattr__(self, name: str) -> str:
        return _empty_table(name, self.user_id_type)


@lru_cache
def _empty_table(name: str, user_id_type: UserIdType) -> str:
    found = build_metadata(user_id_type).tables.get(f"{SCHEMA}.{name}")
    if found is None:
        raise AttributeError(name)
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    columns = (f"CAST(NULL AS {column.type.compile(dialect=dialect)}) AS {column.name}" for column in found.columns)
    return f"(SELECT {', '.join(columns)} WHERE false)"


class Statements:
    """The statements for a mapping. `attached`: trueup is set up, so that its grants and decisions count."""

    def __init__(self, mapping: HostMapping, *, attached: bool) -> None:
        self._mapping = mapping
        self._own = INSTALLED if attached else EmptyTables(mapping.user_id_type)
        self.plan_sizes = self._render(_PLAN_SIZES)
        self.counter_limit = self._render(_COUNTER_LIMIT)
        self.evidence = self._render(_EVIDENCE)

    def page(self, after: UserId | None, only_user: UserId | None) -> TextClause:
        """The next users in order of their ids, at most `:page`: how many, and the last of them."""
        return self._render(_PAGE, within=_among(after, None, only_user))

    def drifted(self, after: UserId | None, last: UserId | None, only_user: UserId | None) -> TextClause:
        """The users of a range whose counters are not what the log says, or whose usage can't be counted."""
        return self._render(_DRIFTED, within=_among(after, last, only_user))

    def _render(self, template: str, **values: object) -> TextClause:
        return render_statement(template, self._mapping, self._own, **values)


def needed_columns(mapping: HostMapping) -> list[Named]:
    """Return the host's columns that a look reads."""
    templates = [_PAGE, _DRIFTED, _EVIDENCE, _PLAN_SIZES, _COUNTER_LIMIT]
    values = {"within": _among(None, None, None)}
    return named_columns(fields_read(templates, mapping, EmptyTables(mapping.user_id_type), **values), mapping)


def _among(after: UserId | None, last: UserId | None, only_user: UserId | None) -> Callable[[str], str]:
    conditions = conditions_of(after, last)
    if only_user is None:
        return conditions
    return lambda column: f"{conditions(column)} AND {column} = :only_user"
