"""The statements of a look: the page of users, what drifts in it, and the evidence for that."""

from sqlalchemy import TextClause

from trueup.accounts.user_ids import UserId
from trueup.host.mapping import HostMapping, render_statement
from trueup.preview.checks import Named, named_in
from trueup.preview.inlined_functions import inline
from trueup.reconcile.shards import within

PAGE = """
    SELECT count(*) AS counters, count(DISTINCT p.user_id) AS users,
           (array_agg(p.user_id ORDER BY p.user_id DESC))[1] AS last, statement_timestamp() AS at
    FROM (SELECT s.{{subscription.user_id}} AS user_id FROM {{subscription}} s
          WHERE s.{{subscription.user_id}} IS NOT NULL [range]
          ORDER BY s.{{subscription.user_id}} LIMIT CAST(:page AS bigint)) p
"""
# By subscription, so that a sum is of its own window. A window that is none began whenever.
DRIFTED = """
    SELECT e.user_id, e.subscription_id, coalesce(e.is_active, false) AS is_active, e.end_date, e.original,
           e.counter AS observed,
           CAST(e.window_start AS text) AS window, coalesce(u.tokens, 0) AS consumed,
           greatest(e.original - coalesce(u.tokens, 0), 0) AS expected
    FROM trueup.entitlements(CAST(:at AS timestamptz)) e
    LEFT JOIN (
        SELECT CAST(w.{{subscription.id}} AS text) AS subscription_id,
               CAST(sum(l.{{usage_log.total_tokens}}) AS bigint) AS tokens
        FROM {{subscription}} w
        JOIN {{usage_log}} l ON l.{{usage_log.user_id}} = w.{{subscription.user_id}}
         AND l.{{usage_log.created_at}} >= coalesce(w.{{subscription.start_date}}, CAST('-infinity' AS timestamptz))
        WHERE l.{{usage_log.success}} [log range]
        GROUP BY w.{{subscription.id}}
    ) u ON u.subscription_id = e.subscription_id
    WHERE e.user_id IS NOT NULL [range]
      AND e.counter IS DISTINCT FROM greatest(e.original - coalesce(u.tokens, 0), 0)
"""
EVIDENCE = """
    SELECT k.user_id, k.evidence
    FROM trueup.drift_evidence(
        CAST(:users AS {{user_id_type}}[]), CAST(:subscriptions AS text[]), CAST(:windows AS timestamptz[]),
        CAST(:original AS bigint[]), CAST(:consumed AS bigint[]), CAST(:observed AS bigint[]),
        CAST(:at AS timestamptz), make_interval(secs => :min_age)) k
"""
PLAN_SIZES = "SELECT p.size FROM trueup.plan_sizes() AS p (size)"
COUNTER_LIMIT = "SELECT trueup.counter_limit()"


class Statements:
    """The statements for a mapping. `attached`: our functions are there; else their bodies stand in the statements."""

    def __init__(self, mapping: HostMapping, *, attached: bool) -> None:
        self.mapping = mapping
        self.attached = attached
        self._rendered: dict[str, TextClause] = {}

    def page(self, after: UserId | None, only_user: UserId | None) -> TextClause:
        """The next users in order of their ids, at most `:page`: how many, and the last of them."""
        return self.rendered(PAGE.replace("[range]", _among("s.{{subscription.user_id}}", after, None, only_user)))

    def drifted(self, after: UserId | None, last: UserId | None, only_user: UserId | None) -> TextClause:
        """The users of a range whose counters are not what the log says."""
        query = DRIFTED.replace("[log range]", _among("l.{{usage_log.user_id}}", after, last, only_user))
        return self.rendered(query.replace("[range]", _among("e.user_id", after, last, only_user)))

    def rendered(self, template: str) -> TextClause:
        """Return a template as a statement; made once, for they are long."""
        if template not in self._rendered:
            whole = template if self.attached else inline(template, self.mapping)
            self._rendered[template] = render_statement(whole, self.mapping)
        return self._rendered[template]


def needed_columns(mapping: HostMapping) -> list[Named]:
    """Return the host's columns that a look reads."""
    templates = (PAGE, DRIFTED, EVIDENCE, PLAN_SIZES, COUNTER_LIMIT)
    return named_in("".join(inline(template, mapping) for template in templates), mapping)


def _among(column: str, after: UserId | None, last: UserId | None, only_user: UserId | None) -> str:
    return within(column, after, last) + ("" if only_user is None else f" AND {column} = :only_user")
