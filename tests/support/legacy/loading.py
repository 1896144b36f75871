"""Loads a population into a database in bulk, as rows that have existed for long."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import Engine, text

from tests.support.legacy.population import PLANS, Person
from trueup.host.fields import PaymentTable, TokenUsageTable
from trueup.host.mapping import HostMapping

WITH_ROWS = HostMapping(
    token_usage=TokenUsageTable(table="billing_tokenusage"), payment=PaymentTable(table="billing_payment")
)
"""The mapping of a host that keeps decrement rows and payments."""

SUBSCRIPTION_OFFSET = 1_000_000
"""The difference between a subscription's id and its user's, so that a confusion of the two is noticed."""


def moment(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def load(engine: Engine, people: list[Person]) -> None:
    """Write all rows; grants of a person come last. The tables of `WITH_ROWS` must exist and be empty."""
    _copy(engine, "accounts_user (id, username, email)", _users(people))
    for table, days, kind in (("billing_tokenplan", "", "token"), ("billing_fullplan", ", duration_days", "full")):
        plans = [plan for plan in PLANS if (plan.days is None) == (kind == "token")]
        _copy(
            engine,
            f"{table} (id, name, tokens_included{days}, is_active)",
            [(plan.id, f"{kind} {plan.tokens}", plan.tokens, *((plan.days,) if days else ()), True) for plan in plans],
        )
    _copy(
        engine,
        "billing_subscription (id, user_id, token_plan_id, full_plan_id, start_date, end_date, tokens_remaining,"
        " is_active, status, trial_end)",
        map(_subscription, people),
    )
    _copy(
        engine,
        "ai_usage_log (id, user_id, section, prompt_tokens, completion_tokens, total_tokens, success, model_name,"
        " error_message, metadata, created_at)",
        _logs(people),
    )
    _copy(
        engine,
        "billing_tokenusage (id, subscription_id, used_tokens, usage_date, description)",
        (
            (row.id, SUBSCRIPTION_OFFSET + person.user_id, row.tokens, moment(row.at), f"AI usage: {row.section}")
            for person in people
            for row in person.life.decrements
        ),
    )
    _copy(
        engine,
        "billing_payment (id, user_id, subscription_id, token_plan_id, full_plan_id, status, payment_date,"
        " transaction_id)",
        _payments(people),
    )
    _copy(engine, "trueup.token_grant (user_id, tokens, reason, reference, granted_at, granted_by)", _grants(people))
    with engine.begin() as connection:
        connection.execute(text("ANALYZE"))


def _copy(engine: Engine, target: str, rows: Iterable[tuple[Any, ...]]) -> None:
    with engine.begin() as connection:
        cursor = connection.connection.cursor()
        with cursor.copy(f"COPY {target} FROM STDIN") as copy:
            for row in rows:
                copy.write_row(row)


def _users(people: list[Person]) -> Iterable[tuple[Any, ...]]:
    return ((person.user_id, f"user{person.user_id}", f"user{person.user_id}@example.com") for person in people)


def _subscription(person: Person) -> tuple[Any, ...]:
    life = person.life
    return (
        SUBSCRIPTION_OFFSET + person.user_id,
        person.user_id,
        *_plan_ids(life.plan),
        moment(life.start),
        moment(life.end),
        life.counter,
        life.is_active,
        life.status,
        moment(life.trial_end),
    )


def _plan_ids(plan: Any) -> tuple[int | None, int | None]:
    if plan is None:
        return None, None
    return (plan.id, None) if plan.days is None else (None, plan.id)


def _logs(people: list[Person]) -> Iterable[tuple[Any, ...]]:
    metadata = json.dumps({"source": "web"})
    for person in people:
        for row in person.life.logs:
            prompt = row.tokens * 3 // 5
            error = None if row.success else "Request timed out."
            figures = (prompt, row.tokens - prompt, row.tokens, row.success, "gpt-4o-mini", error)
            yield (row.id, person.user_id, row.section, *figures, metadata, moment(row.at))


def _payments(people: list[Person]) -> Iterable[tuple[Any, ...]]:
    for person in people:
        for row in person.life.payments:
            subscription = SUBSCRIPTION_OFFSET + person.user_id
            bought = (row.status, moment(row.at), row.transaction_id)
            yield (row.id, person.user_id, subscription, *_plan_ids(row.plan), *bought)


def _grants(people: list[Person]) -> Iterable[tuple[Any, ...]]:
    for person in people:
        for tokens, reference, at in person.life.grants:
            yield (person.user_id, tokens, "imported from a payment", reference, moment(at), "an administrator")
