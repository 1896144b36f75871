"""What grants count for, in plain Python: one event after the other, nothing stored but what was settled."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime

EVER = datetime.max.replace(tzinfo=UTC)
Logged = tuple[datetime, int]


@dataclass(kw_only=True)
class Grant:
    id: int
    tokens: int
    granted_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None = None

    @property
    def ends(self) -> datetime:
        return min(self.expires_at or EVER, self.revoked_at or EVER)

    @property
    def turn(self) -> tuple[datetime, datetime, int]:
        """Who pays first."""
        return self.expires_at or EVER, self.granted_at, self.id


class Window:
    """A window as it goes by: the plan and the grants, and what each has paid for."""

    def __init__(self, plan: int) -> None:
        self.plan = plan
        self.spent = 0  # of the plan and of grants without an expiry
        self.live: list[tuple[Grant, int]] = []
        self.used: dict[int, int] = {}

    def take(self, grant: Grant, tokens: int) -> None:
        self.used[grant.id] += tokens
        self.spent -= tokens

    def lasting(self, before: Grant | None = None) -> int:
        """What the plan and grants without an expiry have, those older than one."""
        return self.plan + sum(
            rest for grant, rest in self.live if not grant.expires_at and (before is None or grant.turn < before.turn)
        )

    def begin(self, grant: Grant, rest: int) -> None:
        self.used[grant.id] = 0
        self.live.append((grant, rest))
        if grant.expires_at:
            self.take(grant, min(rest, max(0, self.spent - self.lasting())))

    def use(self, tokens: int) -> None:
        self.spent += tokens
        for grant, rest in sorted(self.live, key=lambda pair: pair[0].turn):
            if grant.expires_at:
                paid = min(tokens, rest - self.used[grant.id])
                self.take(grant, paid)
                tokens -= paid

    def end(self, grant: Grant, rest: int) -> None:
        if not grant.expires_at:
            self.take(grant, min(rest, max(0, self.spent - self.lasting(grant))))
        self.live.remove((grant, rest))


def used_in(
    grants: Iterable[tuple[Grant, int]], rows: Iterable[Logged], start: datetime, until: datetime, plan: int
) -> dict[int, int]:
    """Return what a window used of each grant, of which it found so much left."""
    grants = [pair for pair in grants if pair[0].granted_at < until and pair[0].ends > max(pair[0].granted_at, start)]
    window = Window(plan)
    begins = [(max(grant.granted_at, start), 1, grant.expires_at is not None, grant.turn, (grant, rest))
              for grant, rest in grants]  # fmt: skip
    ends = [(grant.ends, 0, False, grant.turn, (grant, rest)) for grant, rest in grants if grant.ends <= until]
    uses = [(at, 2, False, (EVER, EVER, 0), tokens) for at, tokens in rows if start <= at < until]
    for _, kind, _, _, what in sorted([*begins, *ends, *uses], key=lambda event: event[:4]):
        if isinstance(what, int):
            window.use(what)
        elif kind == 1:
            window.begin(*what)
        else:
            window.end(*what)
    for grant, rest in sorted(window.live, key=lambda pair: pair[0].turn):
        if not grant.expires_at:
            window.used[grant.id] = min(rest, max(0, window.spent - window.lasting(grant)))
    return window.used


@dataclass(kw_only=True)
class GrantBook:
    """A user's grants. `window`, `plan`: those at which the balance stands; None: there is no balance."""

    grants: dict[int, Grant] = field(default_factory=dict)
    window: datetime | None = None
    plan: int | None = None
    settled: dict[tuple[int, datetime], int] = field(default_factory=dict)

    def found(self, start: datetime, plan: int, rows: list[Logged]) -> list[tuple[Grant, int]]:
        """Return each grant with what a window finds left of it; of one settled in it, what it has paid."""
        before = dict.fromkeys(self.grants, 0)
        for (number, window), tokens in self.settled.items():
            if window < min(start, self.window or start):
                before[number] += tokens
        if self.window is not None and self.window < start:
            old = self.plan if self.plan is not None else plan
            for number, tokens in used_in(self.found(self.window, old, rows), rows, self.window, start, old).items():
                before[number] += tokens
        return [
            (grant, self.settled.get((grant.id, start), grant.tokens - before[grant.id])
             if self.window == start else grant.tokens - before[grant.id])
            for grant in self.grants.values()
        ]  # fmt: skip

    def adds(self, start: datetime, plan: int, rows: list[Logged], now: datetime) -> int:
        """Return what the grants add to a plan."""
        total = 0
        found = self.found(start, plan, rows)
        for grant, rest in found:
            if grant.granted_at > now or grant.ends <= start:
                continue
            if grant.ends > now:
                total += rest
            elif self.window == start and (grant.id, start) in self.settled:
                total += self.settled[grant.id, start]
            else:
                total += used_in(found, rows, start, grant.ends, plan).get(grant.id, 0)
        return total

    def settle(self, start: datetime, plan: int, rows: list[Logged], now: datetime) -> None:
        """Write down what is settled, as whoever locks the balance does."""
        if self.window is not None and self.window < start:
            old = self.plan if self.plan is not None else plan
            for number, tokens in used_in(self.found(self.window, old, rows), rows, self.window, start, old).items():
                if tokens:
                    self.settled.setdefault((number, self.window), tokens)
        self.settled = {
            place: tokens for place, tokens in self.settled.items() if place[1] < start or self.window == start
        }
        self.window, self.plan = start, plan
        found = self.found(start, plan, rows)
        ended = {
            grant.id: used_in(found, rows, start, grant.ends, plan).get(grant.id, 0)
            for grant, _ in found
            if start < grant.ends <= now
        }
        for number, tokens in ended.items():
            self.settled.setdefault((number, start), tokens)

    def left(self, start: datetime, plan: int, rows: list[Logged], now: datetime) -> dict[int, int]:
        """Return what each grant still adds."""
        found = self.found(start, plan, rows)
        used = used_in(found, rows, start, now, plan)
        return {grant.id: rest - used.get(grant.id, 0) if grant.ends > now else 0 for grant, rest in found}
