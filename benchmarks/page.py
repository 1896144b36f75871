"""The weight of the live page: its bytes and processor time with many drifts, and many open pages for a minute.

python -m benchmarks.page [--drifts 10000] [--pages 200] [--seconds 60]
"""

import argparse
import asyncio
import os
import statistics
import time
from contextlib import suppress
from pathlib import Path

import httpx
import jwt
import psutil
from sqlalchemy import Connection, create_engine, text

from benchmarks.api import SECRET, served
from benchmarks.common import own_stack, print_markdown
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.reconcile.local_run import reconcile
from trueup.settings.settings import get_settings

REQUESTS = 20
SAMPLES = 6
WARM_SECONDS = 10.0
LONGEST_PAUSE = 10.0  # after it the next page reads a new snapshot

_CHANGE = text(
    "INSERT INTO trueup.alert (key, kind, channel, payload, status, next_attempt_at, created_at) "
    "VALUES (:key, 'test', 'bench', '{}', 'sent', now(), now())"
)

_HOST = """
    INSERT INTO accounts_user (id, username, email)
    SELECT n, 'user' || n, n || '@example.com' FROM generate_series(1, :n) n;
    INSERT INTO billing_tokenplan (id, name, tokens_included) VALUES (1, 'plan', 10000);
    INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, is_active, tokens_remaining)
    SELECT n, n, 1, now() - interval '1 day', true, 10000 + n % 900 + 1 FROM generate_series(1, :n) n;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drifts", type=int, default=10_000, help="drifts in review")
    parser.add_argument("--pages", type=int, default=200, help="open pages")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long they stay open")
    options = parser.parse_args()
    with own_stack() as urls:
        engine = create_engine(str(urls.database_url))
        with engine.begin() as connection:
            install(connection, get_settings().host, with_host_tables=True)
            _fill(connection, options.drifts)
        reconcile(get_engine(), HostMapping())
        with served() as (process, base_url):
            first_paint(process, base_url)
            asyncio.run(open_pages(process, base_url, options.pages, options.seconds))
        engine.dispose()


def _fill(connection: Connection, drifts: int) -> None:
    for statement in _HOST.split(";"):
        if statement.strip():
            connection.execute(text(statement), {"n": drifts})


def headers() -> dict[str, str]:
    claims = {"sub": "bench", "scope": "trueup:operator", "exp": int(time.time()) + 3600}
    return {"Authorization": f"Bearer {jwt.encode(claims, SECRET, algorithm='HS256')}"}


def spent(process: psutil.Process) -> tuple[float, float]:
    """Return the processor seconds of the API and of PostgreSQL with all its sessions."""
    [pid_file] = Path(os.environ["TRUEUP_HOME"]).rglob("postmaster.pid")
    postmaster = psutil.Process(int(pid_file.read_text().split()[0]))
    # The times of ended sessions are those of the postmaster's children.
    database = sum(postmaster.cpu_times()[:4])
    for session in postmaster.children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            database += sum(session.cpu_times()[:2])
    return sum(process.cpu_times()[:2]), database


def first_paint(process: psutil.Process, base_url: str) -> None:
    """Print what the first page of a process costs, one with a new snapshot, and one with the shared snapshot."""
    rows: list[list[object]] = []
    with httpx.Client(base_url=base_url, headers=headers(), timeout=60) as client:

        def ask(name: str, count: int, pause: float = 0) -> None:
            costs, times, size = [], [], 0
            for _ in range(count):
                time.sleep(pause)
                before, begun = spent(process), time.perf_counter()
                answer = client.get("/").raise_for_status()
                times.append(time.perf_counter() - begun)
                costs.append([now - then for now, then in zip(spent(process), before, strict=True)])
                size = len(answer.content)
            api, database = (statistics.median(cost[place] for cost in costs) for place in (0, 1))
            taken = statistics.median(times)
            rows.append([name, f"{size / 1000:.1f} kB", *(f"{1e3 * one:,.0f} ms" for one in (api, database, taken))])

        ask("the first page of a process", 1)
        ask("with a new snapshot", 5, LONGEST_PAUSE)
        ask("with the shared snapshot", REQUESTS)
    headings = ["page", "size", "processor: API", "processor: PostgreSQL", "until the answer"]
    print_markdown("First paint", headings, rows)


async def open_pages(process: psutil.Process, base_url: str, pages: int, seconds: float) -> None:
    """Keep pages open while something changes every second. Print the events, the processor time and the memory."""
    engine = create_engine(os.environ["TRUEUP_DATABASE_URL"], isolation_level="AUTOCOMMIT")
    memory: list[tuple[float, float]] = []
    events = 0
    started, before = time.perf_counter(), spent(process)
    limits = httpx.Limits(max_connections=pages)
    async with httpx.AsyncClient(base_url=base_url, headers=headers(), limits=limits, timeout=60) as client:

        async def watch() -> None:
            nonlocal events
            async with client.stream("GET", "/events") as stream:
                async for line in stream.aiter_lines():
                    events += line.startswith("data:")
                    if time.perf_counter() - started > seconds:
                        return

        async def change() -> None:
            with engine.connect() as connection:
                while time.perf_counter() - started < seconds + WARM_SECONDS / 2:
                    connection.execute(_CHANGE, {"key": str(time.perf_counter())})
                    await asyncio.sleep(1)

        async def sample() -> None:
            await asyncio.sleep(min(WARM_SECONDS, seconds / 2))
            while time.perf_counter() - started < seconds:
                memory.append((time.perf_counter() - started, process.memory_info().rss / 2**20))
                await asyncio.sleep(seconds / (SAMPLES + 1))

        await asyncio.gather(sample(), change(), *(watch() for _ in range(pages)))
    api, database = (now - then for now, then in zip(spent(process), before, strict=True))
    elapsed = time.perf_counter() - started
    engine.dispose()
    print_markdown(
        f"{pages} open pages for {seconds:.0f} s",
        ["events received", "processor: API", "processor: PostgreSQL"],
        [[f"{events:,}", f"{100 * api / elapsed:.0f} % of a core", f"{100 * database / elapsed:.0f} % of a core"]],
    )
    print_markdown(
        "The server's memory meanwhile", ["after", "RSS"], [[f"{at:.0f} s", f"{rss:.1f} MB"] for at, rss in memory]
    )


if __name__ == "__main__":
    main()
