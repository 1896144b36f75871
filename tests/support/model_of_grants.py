"""A model of grants in plain Python: it replays the events in order and stores only settled use."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise

EVER = datetime.max.replace(tzinfo=UTC)
Logged = tuple[datetime, int]
Plans = list[tuple[datetime, int]]


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
        """The order in which grants are used."""
        return self.expires_at or EVER, self.granted_at, self.id


class Window:
    """A window in the replay: the plan and the grants, and the tokens that each has paid for."""

    def __init__(self) -> None:
        self.plan = 0  # the user's tokens in it, or the tokens that a larger plan before it has paid for
        self.next_plan: int | None = None  # no usage was logged under it yet
        self.spent = 0  # of the plan and of grants without an expiry
        self.live: list[tuple[Grant, int]] = []
        self.used: dict[int, int] = {}

    def take(self, grant: Grant, tokens: int) -> None:
        self.used[grant.id] += tokens
        self.spent -= tokens

    def lasting(self, before: Grant | None = None) -> int:
        """Return the tokens of grants without an expiry that are older than this one."""
        return sum(
            rest for grant, rest in self.live if not grant.expires_at and (before is None or grant.turn < before.turn)
        )

    def begin(self, grant: Grant, rest: int) -> None:
        self.used[grant.id] = 0
        self.live.append((grant, rest))
        if grant.expires_at:
            plan = max(self.plan, self.next_plan or 0)
            self.take(grant, min(rest, max(0, self.spent - plan - self.lasting())))

    def use(self, tokens: int) -> None:
        if self.next_plan is not None:
            self.plan, self.next_plan = max(self.next_plan, min(self.spent, self.plan)), None
        self.spent += tokens
        for grant, rest in sorted(self.live, key=lambda pair: pair[0].turn):
            if grant.expires_at:
                paid = min(tokens, rest - self.used[grant.id])
                self.take(grant, paid)
                tokens -= paid

    def over(self, grant: Grant, rest: int) -> int:
        """Return the usage that a grant without an expiry must pay for: plan and older grants don't cover it."""
        return min(rest, max(0, self.spent - self.plan - self.lasting(grant)))

    def end(self, grant: Grant, rest: int) -> None:
        if not grant.expires_at:
            self.take(grant, self.over(grant, rest))
        self.live.remove((grant, rest))


def used_in(
    grants: Iterable[tuple[Grant, int]], rows: Iterable[Logged], start: datetime, until: datetime, plans: Plans
) -> dict[int, int]:
    """Return a window's use of each grant. `grants`: each with the tokens that were left at its start."""
    grants = [pair for pair in grants if pair[0].granted_at < until and pair[0].ends > max(pair[0].granted_at, start)]
    window = Window()
    first = (EVER, EVER, 0)
    events = [
        *[(grant.ends, 0, False, grant.turn, (grant, rest)) for grant, rest in grants if grant.ends <= until],
        *[(max(at, start) if place else start, 1, False, (EVER, EVER, place), plan)
          for place, (at, plan) in enumerate(plans)],
        *[(max(grant.granted_at, start), 2, grant.expires_at is not None, grant.turn, (grant, rest))
          for grant, rest in grants],
        *[(at, 3, False, first, tokens) for at, tokens in rows if start <= at < until],
    ]  # fmt: skip
    for _, kind, _, _, what in sorted(events, key=lambda event: event[:4]):
        if not isinstance(what, int):
            (window.end if kind == 0 else window.begin)(*what)
        elif kind == 1:
            window.next_plan = what
        else:
            window.use(what)
    for grant, rest in sorted(window.live, key=lambda pair: pair[0].turn):
        if not grant.expires_at:
            window.used[grant.id] = window.over(grant, rest)
    return window.used


@dataclass(frozen=True, kw_only=True)
class Change:
    """The host's subscription changed to this state."""

    at: datetime
    window: datetime
    plan: int


@dataclass(kw_only=True)
class GrantBook:
    """A user's grants. `changes`: the host's changes. `closed`: the settled windows, and the next ones' starts."""

    grants: dict[int, Grant] = field(default_factory=dict)
    changes: list[Change] = field(default_factory=list)
    settled: dict[tuple[int, datetime], int] = field(default_factory=dict)
    closed: dict[datetime, datetime] = field(default_factory=dict)

    def record(self, *changes: Change) -> None:
        if self.grants:
            self.changes.extend(changes)

    def windows(self, start: datetime, plan: int) -> list[tuple[datetime, Plans]]:
        """Return the windows up to this one, each with its plans. A window that moved back removes the later ones."""
        changes = self.changes
        if not changes or changes[-1].window != start:
            changes = [*changes, Change(at=EVER, window=start, plan=plan)]
        windows: list[tuple[datetime, Plans]] = []
        for change in changes:
            while windows and windows[-1][0] > change.window:
                windows.pop()
            if not windows or windows[-1][0] < change.window:
                windows.append((change.window, []))
            windows[-1][1].append((change.at, change.plan))
        return windows

    def written(self, window: datetime, until: datetime) -> dict[int, int]:
        """Return the settled use of grants that expired in a window, which later events of the window do not change."""
        known = min(until, self.closed.get(window, EVER))
        return {
            number: tokens
            for (number, of), tokens in self.settled.items()
            if of == window and self.grants[number].ends <= known and self.grants[number].ends < EVER
        }

    def uses(
        self, start: datetime, plan: int, rows: list[Logged]
    ) -> tuple[dict[int, int], dict[tuple[int, datetime], int]]:
        """Return the tokens left of each grant for this window, and the use by each ended window."""
        left = {number: grant.tokens for number, grant in self.grants.items()}
        uses = {}
        windows = self.windows(start, plan)
        for (window, plans), (until, _) in pairwise(windows):
            if self.closed.get(window) == until:
                used = {number: tokens for (number, of), tokens in self.settled.items() if of == window}
            else:
                written = self.written(window, until)
                found = [(grant, written.get(number, left[number])) for number, grant in self.grants.items()]
                worked_out = used_in(found, rows, window, until, plans)
                used = {number: tokens for number, tokens in worked_out.items() if tokens} | written
            left = {number: max(0, rest - used.get(number, 0)) for number, rest in left.items()}
            uses |= {(number, window): tokens for number, tokens in used.items()}
        return left, uses

    def found(self, start: datetime, plan: int, rows: list[Logged]) -> list[tuple[Grant, int]]:
        """Return each grant with the tokens that a window finds left of it, or with its use if it is settled in it."""
        left, _ = self.uses(start, plan, rows)
        written = self.written(start, EVER)
        return [(grant, written.get(number, left[number])) for number, grant in self.grants.items()]

    def used_until(self, until: datetime, start: datetime, plan: int, rows: list[Logged]) -> dict[int, int]:
        _, plans = self.windows(start, plan)[-1]
        return used_in(self.found(start, plan, rows), rows, start, until, plans)

    def adds(self, start: datetime, plan: int, rows: list[Logged], now: datetime) -> int:
        """Return the tokens that the grants add to a plan."""
        total = 0
        written = self.written(start, EVER)
        for grant, rest in self.found(start, plan, rows):
            if grant.granted_at > now or grant.ends <= start:
                continue
            if grant.ends > now or grant.id in written:
                total += rest
            else:
                total += self.used_until(grant.ends, start, plan, rows).get(grant.id, 0)
        return total

    def settle(self, start: datetime, plan: int, rows: list[Logged], now: datetime) -> None:
        """Record the settled use, as a lock on the balance does."""
        if not self.grants:
            return
        if not self.changes or (self.changes[-1].window, self.changes[-1].plan) != (start, plan):
            self.changes.append(Change(at=now, window=start, plan=plan))
        _, uses = self.uses(start, plan, rows)
        ended = self.written(start, EVER)
        windows = [window for window, _ in self.windows(start, plan)]
        self.settled = uses | {(number, start): tokens for number, tokens in ended.items()}
        self.closed = dict(pairwise(windows))
        self._forget_what_was_taken_back()
        for grant in self.grants.values():
            if start < grant.ends <= now:
                used = self.used_until(grant.ends, start, plan, rows).get(grant.id, 0)
                self.settled.setdefault((grant.id, start), used)

    def _forget_what_was_taken_back(self) -> None:
        changes: list[Change] = []
        for change in self.changes:
            while changes and changes[-1].window > change.window:
                changes.pop()
            changes.append(change)
        self.changes = [
            change
            for before, change in zip([None, *changes], changes, strict=False)
            if before is None or (before.window, before.plan) != (change.window, change.plan)
        ]

    def left(self, start: datetime, plan: int, rows: list[Logged], now: datetime) -> dict[int, int]:
        """Return the tokens that each grant still adds."""
        used = self.used_until(now, start, plan, rows)
        return {
            grant.id: rest - used.get(grant.id, 0) if grant.ends > now else 0
            for grant, rest in self.found(start, plan, rows)
        }
