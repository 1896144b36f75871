"""What a round does, drawn from its seed and number alone: users, tasks, faults and when they strike."""

# ruff: noqa: S311 - drawn to be drawn again, not to be secret

import random
from collections.abc import Iterator
from dataclasses import dataclass

# In the order of a round's chances to meet them: each is met once before any is met again.
TIMED_KINDS = (
    "child_killed",
    "child_killed_in_call",
    "child_killed_after_charge",
    "worker_killed",
    "worker_killed_after_charge",
    "child_stopped",
    "child_stopped_past_lease",
    "child_stopped_past_hold",
    "worker_stopped",
    "redis_restarted",
    "redis_killed",
    "redis_flushed",
    "redis_connections_cut",
    "postgres_restarted",
    "database_sessions_cut",
    "database_sessions_cut_after_charge",
)
LONG_KINDS = ("child_stopped_past_lease", "worker_killed", "worker_killed_after_charge")
# These hold for the whole round.
STANDING_KINDS = ("duplicate_delivery", "clock_skewed")
KINDS = TIMED_KINDS + STANDING_KINDS

GOOD = ("ok", "slow")
PROVIDER_KINDS = (
    "http_500",
    "http_429",
    "timeout",
    "broken_before",
    "broken_after",
    "broken_body",
    "overbilled",
    "no_usage",
    "not_json",
)
BEHAVIOURS = (*GOOD, *PROVIDER_KINDS)

FAULTS_PER_ROUND = 7
WINDOW_SECONDS = 4.0
VISIBILITY_SECONDS = 3
LEASE_MARGIN_SECONDS = 2
SKEWS_SECONDS = (-3600.0, -20.0, -4.0, 4.0, 8.0)
DUPLICATES_PER_ROUND = 4


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault and when it strikes, in seconds from the round's start. `seconds`: how long it lasts."""

    at: float
    kind: str
    target: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """One task, sent `at` seconds from the round's start.

    `script`: how the provider treats its calls the first time they come; `copies`: messages sent.
    """

    task_id: str
    at: float
    user: int
    calls: int
    words: int
    seconds: float
    tokens: int
    cap: int | None
    copies: int
    script: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """All that is decided before a round. `budgets`: tokens of each user's plan. `skew_seconds`: of worker 0."""

    seed: int
    number: int
    workers: int
    concurrency: int
    skew_seconds: float
    budgets: tuple[int, ...]
    tasks: tuple[PlannedTask, ...]
    faults: tuple[Fault, ...]

    @property
    def replay(self) -> str:
        """The command that plays this round again."""
        return f"python -m tests.faults --seed {self.seed} --round {self.number}"

    def serving(self, task_id: str, call: int, times: int) -> str:
        """Say how the provider treats a call that has come `times` times before."""
        tasks = {task.task_id: task for task in self.tasks}
        if times == 0 and task_id in tasks:
            return tasks[task_id].script[call - 1]
        return _behaviour(random.Random(f"{self.seed}/{self.number}/{task_id}/{call}/{times}"), fault_rate=0.2)


def plan_round(seed: int, number: int) -> RoundPlan:
    """Draw a round. The same seed and number always give the same."""
    draw = random.Random(f"{seed}/{number}")
    kinds = _dealt(seed, number)
    budgets = tuple(draw.randint(150, 900) for _ in range(draw.randint(4, 7)))
    duplicates = DUPLICATES_PER_ROUND if "duplicate_delivery" in kinds else 0
    return RoundPlan(
        seed=seed,
        number=number,
        workers=2,
        concurrency=draw.choice((2, 3)),
        skew_seconds=draw.choice(SKEWS_SECONDS) if "clock_skewed" in kinds else 0.0,
        budgets=budgets,
        tasks=tuple(_task(draw, number, index, len(budgets), duplicates) for index in range(draw.randint(28, 40))),
        faults=tuple(sorted(_faults(draw, kinds), key=lambda fault: fault.at)),
    )


def _dealt(seed: int, number: int) -> list[str]:
    """Return the round's share of an endless row of shuffled decks, so that no kind is met rarely."""
    first = number * FAULTS_PER_ROUND
    return [_card(seed, position) for position in range(first, first + FAULTS_PER_ROUND)]


def _card(seed: int, position: int) -> str:
    deck = list(KINDS)
    random.Random(f"{seed}/deck/{position // len(deck)}").shuffle(deck)
    return deck[position % len(deck)]


def _faults(draw: random.Random, kinds: list[str]) -> Iterator[Fault]:
    for kind in kinds:
        if kind in TIMED_KINDS:
            yield Fault(
                # What lasts long begins early, or the round would wait for it alone.
                at=round(draw.uniform(0.2, WINDOW_SECONDS / (2 if kind in LONG_KINDS else 1)), 2),
                kind=kind,
                target=draw.randrange(1_000),
                seconds=round(draw.uniform(0.3, 1.5), 2),
            )


def _task(draw: random.Random, number: int, index: int, users: int, duplicates: int) -> PlannedTask:
    calls = draw.choice((1, 1, 2, 2, 3))
    words = draw.randint(5, 25)
    return PlannedTask(
        task_id=f"r{number}-t{index}",
        # Half at once, for the queue to be full; the others while faults strike.
        at=0.0 if index % 2 else round(draw.uniform(0, WINDOW_SECONDS), 2),
        user=draw.randrange(users),
        calls=calls,
        words=words,
        seconds=round(draw.choice((0.0, 0.05, 0.2, 0.5)), 2),
        # Mostly enough for the calls; sometimes a hold that runs dry.
        tokens=calls * (words + draw.choice((25, 45, 60, 80))),
        cap=draw.choice((None, None, 15, 30)),
        copies=2 if index < duplicates else 1,
        script=tuple(_behaviour(draw, fault_rate=0.3) for _ in range(calls)),
    )


def _behaviour(draw: random.Random, *, fault_rate: float) -> str:
    if draw.random() < fault_rate:
        return draw.choice(PROVIDER_KINDS)
    return draw.choice(("ok", "ok", "ok", "slow"))
