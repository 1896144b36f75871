"""One client of benchmarks.peers, in an interpreter of the peer's or of ours. It imports only what it measures.

python peer_client.py snipz|trueup URL

It reads commands from standard input and answers each with a line: `run SECONDS USER` runs cycles for that time for
that user (0: users 1 to 1,000 in turn), `count CYCLES USER` runs that many. The answer: the cycles and the seconds.
"""

import asyncio
import importlib
import itertools
import os
import sys
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

USERS = 1_000
Cycle = Callable[[int], Awaitable[None]]


def snipz_cycle(url: str) -> Cycle:
    """Reserve and commit, as the peer's README shows it: one pool of asyncpg, no request id."""
    snipz: Any = importlib.import_module("snipz")
    budget = snipz.Budget(url)

    async def cycle(user: int) -> None:
        reservation = await budget.reserve(snipz.Scope("user", str(user)), Decimal(20))
        await reservation.commit(Decimal(10))

    return cycle


def trueup_cycle(url: str) -> Cycle:
    """Hold, and charge with close, as docs/python.md shows it."""
    os.environ["TRUEUP_DATABASE_URL"] = url
    billing: Any = importlib.import_module("trueup.billing.token_hold")

    async def cycle(user: int) -> None:
        with billing.ai_tokens(user, 20, "F", section="chat") as hold:
            hold.charge(prompt_tokens=5, completion_tokens=5, model_name="bench", last=True)

    return cycle


async def serve(cycle: Cycle) -> None:
    users = itertools.cycle(range(1, USERS + 1))
    print("ready", flush=True)  # noqa: T201 - the protocol
    for line in sys.stdin:
        command, amount, user = line.split()
        started, done = time.perf_counter(), 0
        while done < int(amount) if command == "count" else time.perf_counter() < started + float(amount):
            await cycle(int(user) or next(users))
            done += 1
        print(done, time.perf_counter() - started, flush=True)  # noqa: T201


if __name__ == "__main__":
    name, url = sys.argv[1:]
    asyncio.run(serve({"snipz": snipz_cycle, "trueup": trueup_cycle}[name](url)))
