"""Several worker processes against a PostgreSQL that has one core: what it can do, and what our code makes of it.

python -m benchmarks.scale [--seconds 5]

Each process runs cycles of `ai_tokens` (a hold, and a charge that closes it) for 1,000 users in turn. pgbench runs the
same statements with as many clients. The server and its processes have core 0, all others the rest. The rounds are
interleaved.
"""

import argparse
import os
import statistics
import sys
from contextlib import suppress

import psutil
import psycopg

from benchmarks.admission import libpq, pgbench
from benchmarks.common import ROUNDS, own_stack, print_markdown
from benchmarks.peer_client import USERS
from benchmarks.peers import clients, prepare_ours, rate

PROCESSES = (1, 2, 4, 8)
SERVER_CORES = {0}

CYCLE = f"""
\\set user random(1, {USERS})
\\set task random(1, 9223372036854775806)
SELECT reason FROM trueup.open_hold(:user, (:task)::text, '', 0, 0, 'F', 'chat', 'me', 20, '90 s', '1200 s',
                                     0, 'enforce', NULL);
SELECT late FROM trueup.record_charge(:user, (:task)::text, 1, '1', gen_random_uuid()::text, 'chat', 5, 5, 10, 1,
                                      'bench', '{{}}', NULL, NULL, NULL, true);
"""


def pin_server(url: str) -> None:
    """Give the server and its processes their cores, and this process and its children the rest."""
    with psycopg.connect(libpq(url)) as connection:
        server = psutil.Process(connection.info.backend_pid).parent()
    if server is None:
        raise RuntimeError("the server has ended")
    server.cpu_affinity(list(SERVER_CORES))  # first: what it starts from now on inherits it
    for process in server.children():
        with suppress(psutil.NoSuchProcess):
            process.cpu_affinity(list(SERVER_CORES))
    others = os.sched_getaffinity(0) - SERVER_CORES
    if not others:
        raise RuntimeError("this benchmark needs two cores")
    os.sched_setaffinity(0, others)


def busy_seconds(core: int) -> float:
    """Return the seconds that the core has worked since the machine started."""
    times = psutil.cpu_times(percpu=True)[core]
    return sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=5, help="how long each round takes")
    options = parser.parse_args()
    with own_stack() as urls:
        url = str(urls.database_url)
        prepare_ours(url)
        pin_server(url)
        rows = []
        for count in PROCESSES:
            ours, bare, busy = [], [], []
            with clients(sys.executable, "trueup", url, count) as processes:
                for _ in range(ROUNDS + 1):
                    worked = busy_seconds(0)
                    ours.append(rate(processes, f"run {options.seconds} 0"))
                    busy.append((busy_seconds(0) - worked) / options.seconds)
                    bare.append(pgbench(url, CYCLE, count, options.seconds))
            # The first round makes plans and connections.
            mine, other, load = (statistics.median(taken[1:]) for taken in (ours, bare, busy))
            rows.append([count, f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.2f}", f"{load:.0%}"])
        print_markdown(
            "Cycles per second of a PostgreSQL with one core",
            ["processes", "trueup", "pgbench", "ratio", "the server's core at work"],
            rows,
        )


if __name__ == "__main__":
    main()
