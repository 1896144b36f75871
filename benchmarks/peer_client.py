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
    """Hold, charge and close, as a metered task does them."""
    os.environ["TRUEUP_DATABASE_URL"] = url
    retry: Any = importlib.import_module("trueup.database.retry")
    holds: Any = importlib.import_module("trueup.gate.holds")
    charges: Any = importlib.import_module("trueup.usage.charges")
    usage = charges.Usage(prompt_tokens=5, completion_tokens=5, total_tokens=10, response_time_ms=1, model_name="bench")
    numbers = itertools.count()

    async def cycle(user: int) -> None:
        task = f"{os.getpid()}-{next(numbers)}"
        hold = retry.once(
            lambda connection: holds.open_hold(
                connection,
                user_id=user,
                task_id=task,
                feature_name="F",
                section="chat",
                estimated_tokens=20,
                owner="me",
                lease_seconds=90,
                ttl_seconds=1200,
            )
        )
        retry.retrying(lambda connection: charges.record_charge(connection, hold, call_key="1:a", usage=usage))
        retry.retrying(lambda connection: holds.close_hold(connection, hold, completed=True))

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
