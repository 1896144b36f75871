"""A host that keeps rows of its decrements and payments, and one subscriber whose two records may differ."""

from datetime import datetime, timedelta

from sqlalchemy import Connection, text

from tests.support.host import START, Host
from trueup.drift.causes import Explanation
from trueup.drift.detect import Drift, find_drifts
from trueup.drift.explain import explain
from trueup.host.fields import PaymentTable, TokenUsageTable
from trueup.host.mapping import HostMapping

MAPPED = HostMapping(
    token_usage=TokenUsageTable(table="billing_tokenusage"), payment=PaymentTable(table="billing_payment")
)
NOON = START + timedelta(days=1)
SECOND, MINUTE, HOUR, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1), timedelta(days=1)


class Books:
    """One subscriber of a host that keeps rows of its decrements and payments."""

    def __init__(self, host: Host, connection: Connection) -> None:
        self.host = host
        self.connection = connection
        self.user = host.subscriber(10_000)

    def log(self, tokens: int | None, at: datetime = NOON, *, success: bool = True) -> str:
        return str(self.host.log(self.user, tokens, at=at, success=success))

    def row(self, tokens: int | None, at: datetime = NOON) -> str:
        """Insert a decrement row. Returns its id."""
        row: int = self.host.value(
            "INSERT INTO billing_tokenusage (subscription_id, used_tokens, usage_date) "
            "SELECT id, :tokens, :at FROM billing_subscription WHERE user_id = :user RETURNING id",
            tokens=tokens,
            at=at,
            user=self.user,
        )
        return str(row)

    def lower(self, tokens: int, at: datetime = NOON) -> str:
        """Lower the counter, as the host does, and insert the decrement row."""
        self.host.decrement(self.user, tokens)
        return self.row(tokens, at + SECOND)

    def use(self, tokens: int, at: datetime = NOON) -> None:
        """Use tokens without any fault."""
        self.log(tokens, at)
        self.lower(tokens, at)

    def pay(self, plan: int, at: datetime, *, status: str = "completed", reference: str | None = "t1") -> str:
        payment: int = self.host.value(
            "INSERT INTO billing_payment (user_id, token_plan_id, status, payment_date, transaction_id) "
            "VALUES (:user, :plan, :status, :at, :reference) RETURNING id",
            user=self.user,
            plan=plan,
            status=status,
            at=at,
            reference=reference,
        )
        return str(payment)

    def own_plan(self) -> int:
        plan: int = self.host.value(
            "SELECT token_plan_id FROM billing_subscription WHERE user_id = :user", user=self.user
        )
        return plan

    def add(self, tokens: int) -> None:
        """Raise the counter."""
        self.host.execute(
            "UPDATE billing_subscription SET tokens_remaining = tokens_remaining + :tokens WHERE user_id = :user",
            tokens=tokens,
            user=self.user,
        )

    def drift(self, min_age_seconds: int = 60) -> Drift:
        (found,) = find_drifts(self.connection, [self.user], "bigint", min_age_seconds=min_age_seconds)
        return found

    def explained(self) -> Explanation:
        drift = self.drift()
        sizes = self.connection.scalars(text("SELECT trueup.plan_sizes()")).all()
        explanation = explain(drift, plan_sizes=frozenset(sizes), counter_limit=2**31 - 1, now=NOON)
        assert sum(part.tokens for part in explanation.components) + explanation.in_flight == drift.surplus
        return explanation

    # With the journal, whose entries have the time of the server's clock.

    def log_now(self, tokens: int, *, success: bool = True) -> str:
        return str(self.host.log(self.user, tokens, at=self.host.value("SELECT clock_timestamp()"), success=success))

    def spend(self, tokens: int) -> None:
        """Use tokens without any fault, now."""
        self.log_now(tokens)
        self.host.decrement(self.user, tokens)

    def set(self, counter: int) -> None:
        self.host.execute(
            "UPDATE billing_subscription SET tokens_remaining = :counter WHERE user_id = :user",
            counter=counter,
            user=self.user,
        )

    def explained_now(self) -> Explanation:
        drift = self.drift(min_age_seconds=0)
        sizes = self.connection.scalars(text("SELECT trueup.plan_sizes()")).all()
        explanation = explain(drift, plan_sizes=frozenset(sizes), counter_limit=2**31 - 1, now=drift.seen_at)
        assert sum(part.tokens for part in explanation.components) + explanation.in_flight == drift.surplus
        return explanation

    def shares(self) -> dict[str, int]:
        return {part.cause: part.tokens for part in self.explained().components}
