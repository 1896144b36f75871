"""The plan of a round, drawn from its seed and number alone: users, tasks, and faults with their times."""

# ruff: noqa: S311 - the random numbers must repeat, and are no secrets

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from tests.faults.kinds import (
    COMPLETE_KINDS,
    DUPLICATES_PER_ROUND,
    FAULTS_PER_ROUND,
    GRAPH_KINDS,
    KINDS,
    LONG_KINDS,
    SKEWS_SECONDS,
    STREAM_KINDS,
    TIMED_KINDS,
    WINDOW_SECONDS,
    WORK_SECONDS,
)
from tests.faults.planned import COMPLETE, STREAM, STREAM_CLOSED, STREAM_LEFT, PlannedTask, Sending, Spending, Style

_Task = TypeVar("_Task", bound=PlannedTask)

# The shares of a round's calls and messages that go wrong the first time they come.
_BAD_CALLS, _BAD_STREAMS, _BAD_POSTS = 7, 9, 5
_AGAIN_RATE = 0.2  # the share of the repeated ones
_STYLES: tuple[Style, ...] = ("async", "plain", "threads")
_REUSED = 4  # the task ids of a round with a second request, and as many whose request comes again when it has ended
_SHOPS = 2  # users who send direct messages, which needs a larger budget


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault and its time, in seconds after the round's start. `seconds`: how long it lasts."""

    at: float
    kind: str
    target: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RoundPlan:
    """The decisions before a round. `budgets`: tokens of each user's plan. `skew_seconds`: of worker 0's clock."""

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
        """Return the command that plays this round again."""
        return f"python -m tests.faults --seed {self.seed} --round {self.number}"

    def serving(self, label: str, call: int, times: int) -> str:
        """Return how the provider treats a request's call that has come `times` times before."""
        task = self.task(label)
        if times == 0 and task is not None:
            return task.script[call - 1]
        kinds = STREAM_KINDS if task is not None and task.streams(call) else COMPLETE_KINDS
        return self._again(f"{label}/{call}/{times}", kinds)

    def posting(self, comment_id: str, place: int, times: int) -> str:
        """Return how Instagram treats a comment's message (place 0) or public reply (1) that has come before."""
        for task in self.sendings:
            if task.comment_id == comment_id and times == 0:
                return task.post_script[place]
        return self._again(f"{comment_id}/post {place}/{times}", GRAPH_KINDS)

    def chunks_read(self, label: str, call: int) -> int | None:
        """Return how many chunks of a stream its task reads before it ends it. None: all."""
        task = self.task(label)
        return task.chunks_read(call) if task else None

    def task(self, label: str) -> PlannedTask | None:
        return next((task for task in self.tasks if task.label == label), None)

    @property
    def spendings(self) -> list[Spending]:
        """The tasks that do nothing but call the model."""
        return [task for task in self.tasks if isinstance(task, Spending)]

    @property
    def sendings(self) -> list[Sending]:
        """The tasks that send direct messages."""
        return [task for task in self.tasks if isinstance(task, Sending)]

    def _again(self, name: str, kinds: Sequence[str]) -> str:
        draw = random.Random(f"{self.seed}/{self.number}/{name}")
        return draw.choice(kinds) if draw.random() < _AGAIN_RATE else _good(draw)


def plan_round(seed: int, number: int) -> RoundPlan:
    """Draw a round. The same seed and number always give the same round."""
    draw = random.Random(f"{seed}/{number}")
    kinds = _dealt(seed, number, KINDS, FAULTS_PER_ROUND)
    users = draw.randint(4, 7)
    budgets = [draw.randint(150, 900) for _ in range(users)] + [draw.randint(1500, 4500) for _ in range(_SHOPS)]
    spendings = _scripted(
        draw, seed, number, [_spending(draw, number, index, users) for index in range(draw.randint(26, 34))]
    )
    spendings[1] = _working(draw, spendings[1])
    sendings = _sendings(draw, seed, number, users)
    again = _sent_again(draw, spendings[2:], users)
    if "duplicate_delivery" in kinds:
        spendings, sendings = _duplicated(spendings), _duplicated(sendings)
    return RoundPlan(
        seed=seed,
        number=number,
        workers=2,
        concurrency=draw.choice((2, 3)),
        skew_seconds=draw.choice(SKEWS_SECONDS) if "clock_skewed" in kinds else 0.0,
        budgets=tuple(budgets),
        tasks=(*spendings, *sendings, *again),
        faults=tuple(sorted(_faults(draw, kinds), key=lambda fault: fault.at)),
    )


def _dealt(seed: int, number: int, kinds: Sequence[str], count: int) -> list[str]:
    """Return the round's share of an endless row of shuffled decks, so that each kind comes equally often."""
    first = number * count
    return [_card(seed, kinds, position) for position in range(first, first + count)]


def _card(seed: int, kinds: Sequence[str], position: int) -> str:
    deck = list(kinds)
    random.Random(f"{seed}/{kinds[-1]}/{position // len(deck)}").shuffle(deck)
    return deck[position % len(deck)]


def _faults(draw: random.Random, kinds: list[str]) -> Iterator[Fault]:
    for kind in kinds:
        if kind in TIMED_KINDS:
            yield Fault(
                # A long fault starts early, else the whole round would wait for it.
                at=round(draw.uniform(0.2, WINDOW_SECONDS / (2 if kind in LONG_KINDS else 1)), 2),
                kind=kind,
                target=draw.randrange(1_000),
                seconds=round(draw.uniform(0.3, 1.5), 2),
            )


def _spending(draw: random.Random, number: int, index: int, users: int) -> Spending:
    calls = draw.choice((1, 1, 2, 2, 3))
    words = draw.randint(5, 25)
    ways = [draw.choice((COMPLETE, COMPLETE, STREAM, STREAM, STREAM_CLOSED)) for _ in range(calls)]
    # A stream that is left open keeps its tokens from all later calls, so none comes after it.
    if ways[-1] == STREAM_CLOSED and draw.random() < 0.4:
        ways[-1] = STREAM_LEFT
    style = _STYLES[index % len(_STYLES)]
    extends = draw.random() < 0.3 and style != "threads"
    # Without a cap, the first of several calls at once would be granted all tokens of the hold.
    cap = draw.choice((15, 30)) if style == "threads" else draw.choice((None, None, 15, 30))
    # Usually enough for the calls. Sometimes the hold is too small, or must be extended.
    tokens = draw.choice((10, words + 40)) if extends else calls * (words + draw.choice((25, 45, 60, 80)))
    if style == "threads":
        tokens = calls * (words + (cap or 0) + 30)
    return Spending(
        task_id=f"r{number}-t{index}",
        # Half of them at once, to fill the queue; the others while faults strike.
        at=0.0 if index % 2 else round(draw.uniform(0, WINDOW_SECONDS), 2),
        user=draw.randrange(users),
        ways=tuple(ways),
        words=words,
        seconds=round(draw.choice((0.0, 0.05, 0.2, 0.5)), 2),
        tokens=tokens,
        cap=cap,
        extends=extends,
        style=style,
        copies=1,
        script=(),
    )


def _working(draw: random.Random, task: Spending) -> Spending:
    """Let a task work between two calls for longer than its hold lives without a heartbeat."""
    return replace(
        task,
        at=0.0,
        ways=(COMPLETE, COMPLETE),
        script=("ok", "ok"),
        seconds=0.0,
        tokens=2 * (task.words + 60),
        cap=30,
        extends=False,
        style=draw.choice(("plain", "async")),
        works=WORK_SECONDS,
    )


def _sent_again(draw: random.Random, tasks: list[Spending], users: int) -> list[Spending]:
    """Return requests that use the id of a task again: the same request when it has ended, and other ones."""
    chosen = draw.sample(tasks, 2 * _REUSED)
    same = [replace(task, after=True) for task in chosen[:_REUSED]]
    others = [
        replace(
            task,
            request=2,
            # Soon enough for the first one to be at work still, or when it has its result.
            after=index % 2 == 0,
            at=round(task.at + draw.uniform(0.1, 1.0), 2),
            user=task.user if draw.random() < 0.5 else draw.randrange(users),
            words=task.words + 1,
            script=tuple(_good(draw) for _ in task.ways),
        )
        for index, task in enumerate(chosen[_REUSED:])
    ]
    return [*same, *others]


def _scripted(draw: random.Random, seed: int, number: int, tasks: list[Spending]) -> list[Spending]:
    """Give each call a behaviour: the round's share of bad ones to some, and good ones to the others."""
    scripts = [[_good(draw) for _ in task.ways] for task in tasks]
    places = [(index, call) for index, task in enumerate(tasks) for call in range(len(task.ways))]
    # The first calls of the first tasks are made most often, because others are denied or killed before.
    places.sort(key=lambda place: draw.random() * (1 + 2 * place[1] + tasks[place[0]].at))
    for streams, kinds, count in ((False, COMPLETE_KINDS, _BAD_CALLS), (True, STREAM_KINDS, _BAD_STREAMS)):
        fitting = [(index, call) for index, call in places if tasks[index].streams(call + 1) == streams]
        for (index, call), kind in zip(fitting, _dealt(seed, number, kinds, count), strict=False):
            scripts[index][call] = kind
    return [replace(task, script=tuple(script)) for task, script in zip(tasks, scripts, strict=True)]


def _sendings(draw: random.Random, seed: int, number: int, users: int) -> list[Sending]:
    count = draw.randint(8, 11)
    bad: list[str | None] = [*_dealt(seed, number, GRAPH_KINDS, _BAD_POSTS)]
    bad += [None] * (count - len(bad))
    draw.shuffle(bad)
    return [
        Sending(
            task_id=f"r{number}-m{index}",
            at=0.0 if index % 3 == 0 else round(draw.uniform(0, WINDOW_SECONDS), 2),
            user=users + draw.randrange(_SHOPS),
            copies=1,
            script=(draw.choice(COMPLETE_KINDS) if draw.random() < _AGAIN_RATE else _good(draw),),
            mode=draw.choice(("PRODUCT", "PRODUCT", "STATIC")),
            words=draw.randint(5, 25),
            replies=draw.random() < 0.4,
            post_script=(kind or _good(draw), draw.choice(GRAPH_KINDS) if draw.random() < _AGAIN_RATE else _good(draw)),
        )
        for index, kind in enumerate(bad)
    ]


def _duplicated(tasks: list[_Task]) -> list[_Task]:
    """Deliver some of the tasks twice."""
    return [replace(task, copies=2 if index < DUPLICATES_PER_ROUND else 1) for index, task in enumerate(tasks)]


def _good(draw: random.Random) -> str:
    return draw.choice(("ok", "ok", "ok", "slow"))
