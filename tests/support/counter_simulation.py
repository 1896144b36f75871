"""A simulated host and the journal that its counters would leave, with the true cause of each part of their drift.

The host reads a counter, works, and writes it back, as an application with an ORM does. Requests overlap; jobs hold an
object for minutes; other code saves whole objects. Each write records what it did wrong.
"""

import functools
import heapq
import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from trueup.drift.story import Decrement, Entry, Payment, Story, Usage

HOUR = 3_600.0
START = 1_730_000_000.0
PACKS = (20_000, 50_000)
PLANS = (100_000, 300_000, 1_000_000)

# How often each act happens, by a thousand requests.
ACTS = {
    "request": 862,
    "job": 40,
    "save": 25,
    "miss": 20,
    "double": 12,
    "failed": 15,
    "charge_failed": 6,
    "unlogged": 3,
    "charge": 10,
    "charge_locked": 2,
    "charge_twice": 3,
    "pack": 1,
    "edit": 1,
}


@dataclass
class Life:
    """One user's counter: its journal, the rows of the host, and the truth."""

    dice: random.Random
    counter: int
    entries: list[Entry] = field(default_factory=list)
    usage: list[Usage] = field(default_factory=list)
    decrements: list[Decrement] = field(default_factory=list)
    payments: list[Payment] = field(default_factory=list)
    truth: Counter[str] = field(default_factory=Counter)
    queue: list[tuple[float, int, Callable[[float], None]]] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def __post_init__(self) -> None:
        self.first, self.used, self.added = self.counter, 0, 0

    @property
    def drift(self) -> int:
        """The counter less what remains by the log."""
        return self.counter - (self.first - self.used)

    def story(self) -> Story:
        return Story(
            entries=self.entries, usage=self.usage, decrements=self.decrements, payments=self.payments,
            payments_mapped=True, plan_sizes=frozenset(PLANS),
        )  # fmt: skip

    def at(self, when: float, act: Callable[[float], None]) -> None:
        heapq.heappush(self.queue, (when, next(self.numbers), act))

    def run(self) -> None:
        while self.queue:
            when, _, act = heapq.heappop(self.queue)
            act(when)

    def log(self, at: float, tokens: int, *, counts: bool = True, own: bool = False) -> None:
        self.usage.append(Usage(id=f"u{next(self.numbers)}", tokens=tokens, at=at, counts=counts, own=own))
        self.used += tokens if counts else 0

    def write(self, at: float, value: int, *, application: str = "shop", writer: str = "host") -> None:
        if value != self.counter:
            number = next(self.numbers)
            self.entries.append(
                Entry(
                    id=number,
                    old=self.counter,
                    new=value,
                    at=at,
                    transaction=number,
                    application=application,
                    writer=writer,
                )
            )
        self.counter = value

    def subtract(self, at: float, read: int, tokens: int, cause: str | None) -> None:
        """Write back `read` less tokens. `cause`: why these tokens should not be subtracted; None: they should."""
        new = max(0, read - tokens)
        stale, clamped = read - self.counter, new - (read - tokens)
        self.truth["stale_write"] += stale
        if cause is None:
            self.truth["clamped_at_zero"] += clamped
        else:
            self.truth[cause] += clamped - tokens
        self.write(at, new)
        self.decrements.append(Decrement(id=f"d{next(self.numbers)}", tokens=tokens, at=at))


def size(dice: random.Random) -> int:
    return max(7, min(15_000, int(400 * math.exp(dice.gauss(0, 1.2)))))


def live(seed: str, *, per_hour: float, hours: float) -> Life:
    """Return a user with about so many requests an hour."""
    dice = random.Random(seed)  # noqa: S311 - it makes histories, and guards nothing
    # Some users run out of tokens; this host lets no request begin then.
    expected = per_hour * hours * 820
    life = Life(dice=dice, counter=round(expected * dice.choice((0.8, 1.5, 2, 3, 3, 3)), -3))
    when = START
    while (when := when + dice.expovariate(per_hour / HOUR)) < START + hours * HOUR:
        act = dice.choices(list(ACTS), list(ACTS.values()))[0]
        life.at(when, functools.partial(_begin, life, globals()[f"_{act}"]))
    life.run()
    return life


def _begin(life: Life, act: Callable[[Life, float], None], when: float) -> None:
    if life.counter > 0:
        act(life, when)


def _request(life: Life, when: float) -> None:
    """Log the usage, then read, compute and write the counter; mostly within milliseconds."""
    tokens, dice = size(life.dice), life.dice
    pause = dice.choice((0.001, 0.003, 0.02, 0.5))

    def read(now: float) -> None:
        value = life.counter
        life.at(now + pause, lambda then: life.subtract(then, value, tokens, None))

    life.at(when, lambda now: life.log(now, tokens))
    life.at(when + dice.uniform(0.001, 0.1), read)


def _job(life: Life, when: float) -> None:
    """Load the subscription, call a provider for a minute, log the usage, and save the object loaded before."""
    tokens, dice = size(life.dice), life.dice
    taken = dice.uniform(20, 120)

    def load(now: float) -> None:
        value = life.counter

        def save(then: float) -> None:
            life.log(then, tokens)
            life.subtract(then + 0.01, value, tokens, None)

        life.at(now + taken, save)

    life.at(when, load)


def _save(life: Life, when: float) -> None:
    """Save the whole object for another reason, such as a changed setting."""
    taken = life.dice.uniform(0.05, 60)

    def load(now: float) -> None:
        value = life.counter

        def save(then: float) -> None:
            life.truth["stale_write"] += value - life.counter
            life.write(then, value)

        life.at(now + taken, save)

    life.at(when, load)


def _miss(life: Life, when: float) -> None:
    """Log the usage, and fail before the decrement. A counter at zero has nothing to lose."""
    tokens = size(life.dice)

    def log(now: float) -> None:
        life.log(now, tokens)
        life.truth["clamped_at_zero" if life.counter == 0 else "missed_decrement"] += tokens

    life.at(when, log)


def _again(life: Life, when: float, tokens: int, cause: str) -> None:
    life.at(when, lambda now: life.subtract(now, life.counter, tokens, cause))


def _double(life: Life, when: float) -> None:
    tokens = size(life.dice)
    life.at(when, lambda now: life.log(now, tokens))
    life.at(when + 0.05, lambda now: life.subtract(now, life.counter, tokens, None))
    _again(life, when + life.dice.uniform(0.5, 30), tokens, "double_decrement")


def _failed(life: Life, when: float) -> None:
    tokens = size(life.dice)
    life.at(when, lambda now: life.log(now, tokens, counts=False))


def _charge_failed(life: Life, when: float) -> None:
    tokens = size(life.dice)
    life.at(when, lambda now: life.log(now, tokens, counts=False))
    _again(life, when + 0.05, tokens, "failed_usage_charged")


def _unlogged(life: Life, when: float) -> None:
    tokens = size(life.dice)

    def lower(now: float) -> None:
        life.subtract(now, life.counter, tokens, "charged_not_logged")

    life.at(when, lower)


def _charge(life: Life, when: float) -> None:
    """trueup's own charge: log row and counter in one transaction."""
    tokens = size(life.dice)

    def charge(now: float) -> None:
        life.log(now, tokens, own=True)
        new = max(0, life.counter - tokens)
        life.truth["clamped_at_zero"] += new - (life.counter - tokens)
        life.write(now, new, application="trueup", writer="charge")

    life.at(when, charge)


def _charge_locked(life: Life, when: float) -> None:
    tokens = size(life.dice)

    def charge(now: float) -> None:
        life.log(now, tokens, own=True)
        life.truth["clamped_at_zero" if life.counter == 0 else "missed_decrement"] += tokens

    life.at(when, charge)


def _charge_twice(life: Life, when: float) -> None:
    """The host subtracts what trueup has charged."""
    tokens = size(life.dice)

    def charge(now: float) -> None:
        life.log(now, tokens, own=True)
        new = max(0, life.counter - tokens)
        life.truth["clamped_at_zero"] += new - (life.counter - tokens)
        life.write(now, new, application="trueup", writer="charge")
        life.at(now + 0.2, lambda then: life.subtract(then, life.counter, tokens, "host_decremented_our_charge"))

    life.at(when, charge)


def _pack(life: Life, when: float) -> None:
    tokens = life.dice.choice(PACKS)

    def buy(now: float) -> None:
        life.payments.append(Payment(id=f"p{next(life.numbers)}", tokens=tokens, at=now))
        life.truth["credit_without_grant"] += tokens
        life.write(now + 0.01, life.counter + tokens)

    life.at(when, buy)


def _edit(life: Life, when: float) -> None:
    tokens = life.dice.choice((500, 1_000, 2_500, 10_000))

    def edit(now: float) -> None:
        life.truth["manual_edit"] += tokens
        life.write(now, life.counter + tokens, application="psql")

    life.at(when, edit)
