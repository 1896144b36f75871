"""The cost of the API: the check-only gate in a view, the views themselves, and many clients at once.

python -m benchmarks.api [--requests 400] [--clients 200] [--seconds 30]
"""

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import jwt
import psutil

from benchmarks.common import ROUNDS, interleaved, micros, own_stack, print_markdown
from benchmarks.guarded_task import USERS, prepare

SECRET = "a secret of the benchmark's own, of 32 bytes or more"
BOOT_SECONDS = 60.0
VIEWS = ("/api/accounts/overview", "/api/billing/overview", "/api/billing/subscription", "/api/billing/plans")
SAMPLES = 6
WARM_SECONDS = 5.0  # the memory is measured after these


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=400, help="requests of each kind in a round")
    parser.add_argument("--clients", type=int, default=200, help="clients at once; 0: not measured")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long they ask")
    options = parser.parse_args()
    with own_stack() as urls:
        prepare(str(urls.database_url))
        with served() as (process, base_url):
            compare(base_url, options.requests)
            if options.clients:
                asyncio.run(crowd(process, base_url, options.clients, options.seconds))


@contextmanager
def served() -> Iterator[tuple[psutil.Process, str]]:
    """Serve `benchmarks.gated_app` as `trueup api` serves the API. Gives its process and address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "TRUEUP_API__JWT_SECRET": SECRET,
        "TRUEUP_API__RATE_LIMIT_PER_MINUTE": "100000000",
        "TRUEUP_API__PORT": str(port),
        "TRUEUP_LOG_LEVEL": "WARNING",
    }
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.gated_app"], env=environment)
    base_url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + BOOT_SECONDS
        while not _answers(base_url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit("the API does not answer")
            time.sleep(0.1)
        yield psutil.Process(process.pid), base_url
    finally:
        process.terminate()
        process.wait(30)


def _answers(base_url: str) -> bool:
    try:
        return httpx.get(f"{base_url}/healthz").status_code == 200
    except httpx.TransportError:
        return False


def headers_of(user: int) -> dict[str, str]:
    token = jwt.encode({"user_id": user, "exp": int(time.time()) + 3600}, SECRET, algorithm="HS256")
    return {"Authorization": f"Bearer {token}"}


def compare(base_url: str, requests: int) -> None:
    """Time the gated and the bare route, and each view, one request after the other."""
    headers = [headers_of(user) for user in range(1, USERS + 1)]
    with httpx.Client(base_url=base_url) as client:

        def ask(method: str, path: str, number: int) -> None:
            client.request(method, path, headers=headers[number % USERS]).raise_for_status()

        ways = {
            "bare": lambda number: ask("POST", "/bench/bare", number),
            "gated": lambda number: ask("POST", "/bench/gated", number),
            **{path: (lambda number, path=path: ask("GET", path, number)) for path in VIEWS},
        }
        medians = interleaved(ways, requests)
    bare, gated = medians["bare"], medians["gated"]
    print_markdown(
        f"The API, one client (median of {ROUNDS} rounds of {requests})",
        ["route", "a request", "more than bare", "ratio"],
        [[name, micros(taken), micros(taken - bare), f"{taken / bare:.2f}"] for name, taken in medians.items()],
    )
    print(f"\nThe gate adds {(gated - bare) * 1e3:.2f} ms (target: 1 ms at most).")  # noqa: T201


async def crowd(process: psutil.Process, base_url: str, clients: int, seconds: float) -> None:
    """Let many clients call the views without a pause. Print answers, times and the server's memory."""
    statuses: Counter[int | str] = Counter()
    taken: list[float] = []
    memory: list[tuple[float, float]] = []
    before = sum(process.cpu_times()[:2])
    started = time.perf_counter()
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=base_url, limits=limits, timeout=60) as client:

        async def ask(number: int) -> None:
            headers = headers_of(number % USERS + 1)
            turn = number
            while time.perf_counter() - started < seconds:
                turn += 1
                begun = time.perf_counter()
                try:
                    answer = await client.get(VIEWS[turn % len(VIEWS)], headers=headers)
                    statuses[answer.status_code] += 1
                except httpx.HTTPError as error:
                    statuses[type(error).__name__] += 1
                taken.append(time.perf_counter() - begun)

        async def sample() -> None:
            await asyncio.sleep(min(WARM_SECONDS, seconds / 2))
            while time.perf_counter() - started < seconds:
                memory.append((time.perf_counter() - started, process.memory_info().rss / 2**20))
                await asyncio.sleep(seconds / (SAMPLES + 1))

        await asyncio.gather(sample(), *(ask(number) for number in range(clients)))
    spent = sum(process.cpu_times()[:2]) - before
    quantiles = statistics.quantiles(taken, n=100)
    print_markdown(
        f"{clients} clients for {seconds:.0f} s",
        ["answers", "a second", "median", "99th", "longest", "server's CPU per answer"],
        [
            [
                ", ".join(f"{status}: {count:,}" for status, count in statuses.most_common()),
                f"{len(taken) / seconds:,.0f}",
                *(f"{1e3 * value:,.0f} ms" for value in (quantiles[49], quantiles[98], max(taken))),
                f"{1e3 * spent / len(taken):.1f} ms",
            ]
        ],
    )
    print_markdown(
        "The server's memory meanwhile", ["after", "RSS"], [[f"{at:.0f} s", f"{rss:.0f} MB"] for at, rss in memory]
    )


if __name__ == "__main__":
    main()
