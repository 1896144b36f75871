"""One subscription's life: a script of the host's acts, played in order of time, and the truth about its faults.

The host's code, as played here: it logs a request. A moment later, in another transaction, it reads the counter and
writes it back, lowered by the request's tokens but never below zero, with a decrement row. Playing the script finds the
tokens that a write loses (the counter had changed since it was read) and the clamped tokens. All other faults
are in the script, marked with their cause.

Times are seconds since 1970, tokens are counts.
"""

import random
import uuid
from dataclasses import dataclass, field
from typing import Literal

DAY = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`days` None: a token plan, which never ends."""

    id: int
    tokens: int
    days: int | None = None
    sold: bool = True


@dataclass(frozen=True, kw_only=True)
class LogRow:
    id: uuid.UUID
    section: str
    tokens: int
    success: bool
    at: float


@dataclass(frozen=True, kw_only=True)
class DecrementRow:
    id: int
    tokens: int
    at: float
    section: str


@dataclass(frozen=True, kw_only=True)
class PaymentRow:
    """`plan` None: the payment was for something else."""

    id: int
    plan: Plan | None
    at: float
    status: str = "completed"

    @property
    def transaction_id(self) -> str:
        return f"txn-{self.id}"


@dataclass(slots=True, kw_only=True)
class Event:
    """One committed act of the host. `key` connects a write with its read; `cause`: the fault in it."""

    at: float
    kind: Literal["log", "read", "write", "pay", "credit", "edit", "window", "grant", "burn", "null", "negative"]
    tokens: int = 0
    success: bool = True
    section: str = "chat"
    key: int = 0
    cause: str = ""
    plan: Plan | None = None
    status: str = "completed"


@dataclass(kw_only=True)
class Truth:
    """The causes of a difference: signed tokens of each (positive: the counter is too high), and their rows."""

    tokens: dict[str, int] = field(default_factory=dict)
    rows: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, tokens: int, *rows: object) -> None:
        self.tokens[cause] = self.tokens.get(cause, 0) + tokens
        self.rows.setdefault(cause, []).extend(str(row) for row in rows)

    def clear(self) -> None:
        self.tokens.clear()
        self.rows.clear()

    @property
    def causes(self) -> frozenset[str]:
        return frozenset(cause for cause in self.tokens)


class Numbers:
    """Ids of one host. Those of decrements and payments are long, so that a text contains one only if it names it."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice
        self.decrement = 5_000_000_000_000
        self.payment = 7_000_000_000_000

    def next_decrement(self) -> int:
        self.decrement += self.dice.randint(1, 3)
        return self.decrement

    def next_payment(self) -> int:
        self.payment += self.dice.randint(1, 3)
        return self.payment

    def log_id(self) -> uuid.UUID:
        return uuid.UUID(int=self.dice.getrandbits(128), version=4)


@dataclass(kw_only=True)
class Life:
    """The rows that a subscription's life left in the host's tables, and the truth about its counter.

    `expected` = max(0, `original` − the window's counted rows), summed by this module.
    """

    plan: Plan
    start: float
    end: float | None
    is_active: bool = True
    status: str = "active"
    trial_end: float | None = None
    counter: int | None = None
    original: int = 0
    consumed: int = 0
    logs: list[LogRow] = field(default_factory=list)
    decrements: list[DecrementRow] = field(default_factory=list)
    payments: list[PaymentRow] = field(default_factory=list)
    grants: list[tuple[int, str, float]] = field(default_factory=list)
    truth: Truth = field(default_factory=Truth)

    @property
    def expected(self) -> int:
        return max(0, self.original - self.consumed)


class Player:
    """Plays a script. The counter starts with the plan's tokens at the window's start."""

    def __init__(self, life: Life, numbers: Numbers) -> None:
        self.life = life
        self.numbers = numbers
        self.counter = life.plan.tokens
        life.original = life.plan.tokens
        self._read: dict[int, tuple[int, int]] = {}

    def play(self, script: list[Event]) -> Life:
        for event in sorted(script, key=lambda event: event.at):
            getattr(self, f"on_{event.kind}")(event)
        life = self.life
        if "counter_null" not in life.truth.causes:
            life.counter = self.counter
            difference = self.counter - (life.original - life.consumed)
            total = sum(life.truth.tokens.values())
            assert total == difference, f"the script's truth {life.truth} is not the difference {difference}"
        return life

    def on_log(self, event: Event) -> None:
        row = LogRow(
            id=self.numbers.log_id(), section=event.section, tokens=event.tokens, success=event.success, at=event.at
        )
        self.life.logs.append(row)
        if event.success:
            self.life.consumed += event.tokens
        if event.cause:
            # A failed row that was charged adds no tokens itself; its decrement does.
            self.life.truth.add(event.cause, event.tokens if event.success else 0, row.id)

    def _read_counter(self, event: Event) -> tuple[int, int]:
        return self.counter, len(self.life.decrements)

    def on_read(self, event: Event) -> None:
        self._read[event.key] = self._read_counter(event)

    def on_write(self, event: Event) -> None:
        life = self.life
        seen, writes = self._read.pop(event.key, None) or self._read_counter(event)
        row = DecrementRow(id=self.numbers.next_decrement(), tokens=event.tokens, at=event.at, section=event.section)
        if seen != self.counter:
            life.truth.add(
                "lost_update", seen - self.counter, row.id, *(other.id for other in life.decrements[writes:])
            )
        if event.tokens > seen:
            life.truth.add("clamped_at_zero", event.tokens - seen, row.id)
        if event.cause:
            life.truth.add(event.cause, -event.tokens, row.id)
        self.counter = max(0, seen - event.tokens)
        life.decrements.append(row)

    def on_pay(self, event: Event) -> None:
        row = PaymentRow(id=self.numbers.next_payment(), plan=event.plan, at=event.at, status=event.status)
        self.life.payments.append(row)
        if event.cause:
            self.life.truth.add(event.cause, 0, row.id)

    def on_credit(self, event: Event) -> None:
        self.counter += event.tokens
        if event.cause:
            self.life.truth.add(event.cause, event.tokens)
        if event.plan is not None and event.plan == self.life.plan and self.life.end is not None:
            self.life.end += (event.plan.days or 0) * DAY

    def on_grant(self, event: Event) -> None:
        """A person turns the newest payment for this plan into a grant, so its tokens count from now on."""
        assert event.plan is not None
        payment = [row for row in self.life.payments if row.plan == event.plan][-1]
        self.life.grants.append((event.plan.tokens, payment.transaction_id, event.at))
        self.life.original += event.plan.tokens

    def on_edit(self, event: Event) -> None:
        self.counter += event.tokens
        assert self.counter >= 0
        self.life.truth.add("manual_edit", event.tokens)

    def on_window(self, event: Event) -> None:
        """Start a new window with a plan. `tokens` of the old counter are kept; only 0 is right."""
        life = self.life
        assert event.plan is not None
        kept = self.counter if event.cause else 0
        life.truth = Truth(rows={event.cause: list(life.truth.rows.get(event.cause, []))} if event.cause else {})
        if event.cause:
            life.truth.add(event.cause, kept)
        life.plan, life.start, life.consumed, life.original = event.plan, event.at, 0, event.plan.tokens
        life.end = None if event.plan.days is None else event.at + event.plan.days * DAY
        life.status, life.trial_end = "active", None
        self.counter = event.plan.tokens + kept

    def on_burn(self, event: Event) -> None:
        life = self.life
        life.truth.clear()
        life.truth.add("burned_at_expiry", life.consumed - life.original)
        life.is_active, life.status = False, "expired"
        self.counter = 0

    def on_null(self, event: Event) -> None:
        self.life.truth.clear()
        self.life.truth.add("counter_null", 0)
        self.life.counter = None

    def on_negative(self, event: Event) -> None:
        life = self.life
        life.truth.clear()
        life.truth.add("counter_negative", -event.tokens - (life.original - life.consumed))
        self.counter = -event.tokens
