"""Choose a host's tables of users, plans, subscriptions, usage log, decrements and payments. Pure."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from trueup.discovery.catalog import Catalog, HostTable
from trueup.discovery.match_columns import SOUGHT_FIELDS, Known, Matches, default_name, match_columns, nearness
from trueup.host.fields import TABLES, Noun

_PLANS: tuple[Noun, Noun] = ("token_plan", "full_plan")
_MIN_SCORE = 0.5
_MIN_USER_SCORE = 0.55
# A table whose score is this close to the best one is a rival.
_CLOSE = 0.05


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A table that may be a noun's. `score`: from 0 to 1. `rival`: another table that fits nearly as well."""

    table: HostTable
    matches: Matches
    score: float
    why: tuple[str, ...]
    rival: HostTable | None = None


def choose_tables(catalog: Catalog) -> dict[Noun, Candidate]:
    """Return the table of each noun for which one was found."""
    chosen: dict[Noun, Candidate] = {}
    users = frozenset(table.oid for table in catalog if _name_score("user", table)[0] >= _MIN_USER_SCORE)
    known: dict[Noun, frozenset[int]] = {"user": users}
    subscription = _best("subscription", _all_but(catalog), known, _judge_subscription)
    taken = {subscription.table.oid} if subscription else set()
    log = _best("usage_log", _all_but(catalog, taken), known, _judge_log(subscription))
    _choose_user(catalog, chosen, known, [one for one in (subscription, log) if one])
    if subscription is not None:
        known["subscription"] = frozenset((subscription.table.oid,))
        _choose_plans(catalog, chosen, known, subscription.table)
        # Match again, now that the tables that its foreign keys reference are known.
        again = _candidate("subscription", subscription.table, known, _judge_subscription)
        chosen["subscription"] = replace(again or subscription, rival=subscription.rival)
    if log is not None:
        again = _candidate("usage_log", log.table, known, _judge_log(subscription))
        chosen["usage_log"] = replace(again or log, rival=log.rival)
    taken = {one.table.oid for one in chosen.values()}
    if subscription is not None:
        decrements = _best("token_usage", _all_but(catalog, taken), known, _judge_reference("subscription_id"))
        if decrements is not None:
            chosen["token_usage"] = decrements
            taken.add(decrements.table.oid)
    payment = _best("payment", _all_but(catalog, taken), known, _judge_reference("user_id"))
    if payment is not None:
        chosen["payment"] = payment
    return chosen


def log_without_total(catalog: Catalog) -> tuple[HostTable, Matches] | None:
    """Return the table that would be the usage log if it had a column for all tokens, and its matches."""
    anchors = (name for name in TABLES["usage_log"].entry.anchors if name != "total_tokens")
    needed = (*anchors, "prompt_tokens", "completion_tokens")
    near = []
    for table in _all_but(catalog):
        matches = match_columns("usage_log", table, {})
        if "total_tokens" not in matches.found and all(name in matches.found for name in needed):
            near.append((_name_score("usage_log", table)[0], table, matches))
    return max(near, key=lambda one: one[0])[1:] if near else None


Judge = Callable[[HostTable, Matches], tuple[float, str]]
"""Returns the number that a table's structure adds to its score, maybe negative, and why."""


def _all_but(catalog: Catalog, taken: Iterable[int] = ()) -> list[HostTable]:
    return [table for table in catalog if table.mappable and table.oid not in set(taken)]


def _name_score(noun: Noun, table: HostTable) -> tuple[float, str]:
    return nearness(table.name, default_name(noun, "table").rpartition(".")[2], TABLES[noun].entry.names)


def _candidate(noun: Noun, table: HostTable, known: Known, judge: Judge) -> Candidate | None:
    matches = match_columns(noun, table, known)
    if not all(name in matches.found for name in TABLES[noun].entry.anchors):
        return None
    named, why = _name_score(noun, table)
    bonus, structure = judge(table, matches)
    required = tuple(name for name, wanted in SOUGHT_FIELDS[noun].items() if wanted.required)
    score = 0.45 * named + 0.4 * matches.mean(required) + bonus
    return Candidate(table=table, matches=matches, score=min(score, 1.0), why=tuple(filter(None, (why, structure))))


def _best(noun: Noun, tables: Iterable[HostTable], known: Known, judge: Judge) -> Candidate | None:
    """Return the table with the best score, if it is high enough."""
    found = [one for table in tables if (one := _candidate(noun, table, known, judge)) and one.score >= _MIN_SCORE]
    # Of equal scores, the table with more rows: the others are leftovers or copies.
    found.sort(key=lambda one: (one.score, one.table.rows or 0), reverse=True)
    if not found:
        return None
    rival = found[1].table if len(found) > 1 and found[1].score >= found[0].score - _CLOSE else None
    return replace(found[0], rival=rival)


def _judge_subscription(table: HostTable, matches: Matches) -> tuple[float, str]:
    if matches.found["user_id"].column.name in table.unique:
        return 0.15, "one row per user (unique), with a counter and a time"
    return -0.1, ""


def _judge_log(subscription: Candidate | None) -> Judge:
    def judge(table: HostTable, matches: Matches) -> tuple[float, str]:
        user = matches.found["user_id"].column
        if user.name in table.unique:
            return -0.4, ""
        if subscription is not None and subscription.matches.found["user_id"].column.kind != user.kind:
            return -0.4, ""
        parts = ("prompt_tokens", "completion_tokens", "success", "model_name")
        bonus = 0.04 * sum(name in matches.found for name in parts)
        # Decrements and a subscription's periods have a user and a time too, but none of these columns.
        return bonus, "many rows per user, with tokens and a time" if bonus else ""

    return judge


def _judge_reference(name: str) -> Judge:
    def judge(table: HostTable, matches: Matches) -> tuple[float, str]:
        column = matches.found[name].column.name
        return (0.15, f"{column} is a foreign key") if column in table.references else (0.0, "")

    return judge


def _choose_user(
    catalog: Catalog, chosen: dict[Noun, Candidate], known: dict[Noun, frozenset[int]], owners: list[Candidate]
) -> None:
    """Choose the users' table: a foreign key of the subscriptions or the log references it, or it has the name."""
    for owner in owners:
        column = owner.matches.found["user_id"].column.name
        target = owner.table.references.get(column)
        if target in catalog.tables:
            table = catalog.tables[target]
            why = (f"{owner.table.setting}.{column} is a foreign key to it",)
            chosen["user"] = Candidate(table=table, matches=match_columns("user", table, {}), score=1.0, why=why)
            known["user"] = frozenset((table.oid,))
            return
    kinds = {owner.matches.found["user_id"].column.kind for owner in owners}
    named = [
        (*_name_score("user", table), table)
        for table in _all_but(catalog)
        if len(table.primary_key) == 1 and (not kinds or table.columns[table.primary_key[0]].kind in kinds)
    ]
    if not named:
        return
    score, reason, table = max(named, key=lambda one: (one[0], one[2].rows or 0))
    if score >= _MIN_USER_SCORE:
        chosen["user"] = Candidate(table=table, matches=match_columns("user", table, {}), score=score, why=(reason,))


def _choose_plans(
    catalog: Catalog, chosen: dict[Noun, Candidate], known: dict[Noun, frozenset[int]], subscription: HostTable
) -> None:
    """Choose the plans' tables: foreign keys of the subscriptions reference them, or they have the names."""
    users = known.get("user", frozenset())
    targets = [
        catalog.tables[oid]
        for column, oid in subscription.references.items()
        if oid in catalog.tables
        and oid not in users
        and oid != subscription.oid
        # Vouchers have tokens too: a plan must be named like one.
        and _is_called_plan(column, catalog.tables[oid])
    ]
    found = {noun: _plans_of(noun, targets, known) for noun in _PLANS}
    if not any(found.values()):
        tables = _all_but(catalog, {subscription.oid, *users})
        found = {
            noun: [one for one in _plans_of(noun, tables, known) if _name_score(noun, one.table)[0] >= _MIN_USER_SCORE]
            for noun in _PLANS
        }
    token, full = found["token_plan"], found["full_plan"]
    if not token or not full:
        return
    # The best pair of different tables; a host with one kind of plan has one table for both.
    pairs = [(t.score + f.score, t, f) for t in token for f in full if t.table.oid != f.table.oid]
    if pairs:
        _, chosen["token_plan"], chosen["full_plan"] = max(pairs, key=lambda pair: pair[0])
    else:
        chosen["token_plan"], chosen["full_plan"] = token[0], full[0]
    for noun in _PLANS:
        known[noun] = frozenset((chosen[noun].table.oid,))


def _is_called_plan(column: str, table: HostTable) -> bool:
    keys = SOUGHT_FIELDS["subscription"]
    return any(
        _name_score(noun, table)[0] or nearness(column, f"{noun}_id", keys[f"{noun}_id"].names)[0] for noun in _PLANS
    )


def _plans_of(noun: Noun, tables: Iterable[HostTable], known: Known) -> list[Candidate]:
    found = [one for table in tables if (one := _candidate(noun, table, known, _judge_plan(noun)))]
    return sorted(found, key=lambda one: one.score, reverse=True)


def _judge_plan(noun: Noun) -> Judge:
    def judge(table: HostTable, matches: Matches) -> tuple[float, str]:
        lasting = "duration_days" in match_columns("full_plan", table, {}).found
        if lasting == (noun == "full_plan"):
            return 0.15, "tokens with a duration" if lasting else "tokens without a duration"
        return 0.0, ""

    return judge
