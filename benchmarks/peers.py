"""Hold, charge and close against the reserve and commit of the nearest peer, snipz, on one server.

python -m benchmarks.peers --peer PYTHON [--seconds 3]

PYTHON is the interpreter of an environment of the peer's own, with Python 3.13 or newer:
`python3.13 -m venv peer && peer/bin/pip install 'snipz[postgres]==0.2.0'`, then `--peer peer/bin/python`.

Both use the same server with the same settings (`fsync` and `synchronous_commit` on), clients in processes of their
own, and the same number of rows for each user. The rounds are interleaved. trueup writes more in a cycle: the host's
log row and counter with their triggers, and a charge that a redelivery finds again.
"""

import argparse
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TextIO, cast

import psycopg
from sqlalchemy import create_engine, text
from sqlalchemy.engine import make_url

from benchmarks.admission import libpq
from benchmarks.common import ROUNDS, own_stack, print_markdown
from benchmarks.peer_client import USERS
from trueup.host.mapping import HostMapping
from trueup.install.example_tables import build_host_metadata
from trueup.install.install import install

CLIENT = Path(__file__).with_name("peer_client.py")
ROWS = 50
LONG = 20_000
# Each comparison has a hot user of its own, so that all begin with the same number of rows.
HOT = {1: USERS + 1, 4: USERS + 2}
LONG_USER = USERS + 3


class Client:
    """A process that runs cycles of one of both."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._commands, self._answers = cast("TextIO", process.stdin), cast("TextIO", process.stdout)
        self.answer()  # it is ready

    def ask(self, command: str) -> None:
        self._commands.write(command + "\n")
        self._commands.flush()

    def answer(self) -> list[str]:
        return self._answers.readline().split()


@contextmanager
def clients(interpreter: str, name: str, url: str, count: int) -> Iterator[list[Client]]:
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                subprocess.Popen(  # noqa: S603 - the interpreter that the developer named
                    [interpreter, str(CLIENT), name, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
                )
            )
            for _ in range(count)
        ]
        yield [Client(process) for process in processes]
        for process in processes:
            process.terminate()


def rate(asked: list[Client], command: str) -> float:
    """Return the cycles per second of all these clients at once."""
    for client in asked:
        client.ask(command)
    return sum(int(done) / float(seconds) for done, seconds in (client.answer() for client in asked))


def prepare_ours(url: str) -> None:
    """Make users 1, 2, … with subscriptions and log rows, and attach trueup."""
    mapping, people = HostMapping(), LONG_USER
    engine = create_engine(url)
    with engine.begin() as connection:
        build_host_metadata(mapping).create_all(connection)
        for statement in (
            "INSERT INTO public.billing_tokenplan (id, name, tokens_included) VALUES (1, 'p', 2000000000)",
            "INSERT INTO public.accounts_user SELECT i, 'user' || i, 'e' FROM generate_series(1, :people) i",
            """INSERT INTO public.billing_subscription (id, user_id, token_plan_id, start_date, tokens_remaining)
               SELECT i, i, 1, now() - interval '1 year', 2000000000 FROM generate_series(1, :people) i""",
            """INSERT INTO public.ai_usage_log (user_id, section, total_tokens, created_at)
               SELECT u, 'chat', 1, now() FROM generate_series(1, :people) u, generate_series(1, :rows) i""",
        ):
            connection.execute(text(statement), {"people": people, "rows": ROWS})
        install(connection, mapping, with_host_tables=False)
    engine.dispose()
    with psycopg.connect(libpq(url), autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")


def prepare_theirs(peer_url: str, peer: str) -> None:
    """Make the same users for the peer, with as many rows."""
    migrate = f"import asyncio, snipz; asyncio.run(snipz.Budget({peer_url!r}).migrate())"
    subprocess.run([peer, "-c", migrate], check=True)  # noqa: S603
    with psycopg.connect(peer_url, autocommit=True) as connection:
        connection.execute(
            'INSERT INTO snipz_limits (scope_type, scope_id, "window", cap_cents) '
            "SELECT 'user', i::text, 'month', 2000000000 FROM generate_series(1, %s) i",
            (LONG_USER,),
        )
        connection.execute(
            "INSERT INTO snipz_ledger (id, reservation_id, scope_type, scope_id, state, estimated_cents, actual_cents, "
            "expires_at) SELECT gen_random_uuid(), gen_random_uuid(), 'user', u::text, 'committed', 1, 1, now() "
            "FROM generate_series(1, %s) u, generate_series(1, %s) i",
            (LONG_USER, ROWS),
        )
        connection.execute("VACUUM ANALYZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True, help="the interpreter that has snipz")
    parser.add_argument("--seconds", type=int, default=3, help="how long each round takes")
    options = parser.parse_args()
    with own_stack() as urls:
        url = str(urls.database_url)
        with psycopg.connect(libpq(url), autocommit=True) as connection:
            connection.execute("CREATE DATABASE snipz")
        peer_url = libpq(make_url(url).set(database="snipz").render_as_string(hide_password=False))
        prepare_ours(url)
        prepare_theirs(peer_url, options.peer)
        rows = []
        for count, who in ((1, 0), (1, HOT[1]), (4, 0), (4, HOT[4])):
            with (
                clients(sys.executable, "trueup", url, count) as ours,
                clients(options.peer, "snipz", peer_url, count) as theirs,
            ):
                pairs = [
                    (rate(ours, f"run {options.seconds} {who}"), rate(theirs, f"run {options.seconds} {who}"))
                    for _ in range(ROUNDS + 1)
                ][1:]  # the first makes plans and connections
            mine, other = (statistics.median(side) for side in zip(*pairs, strict=True))
            rows.append(
                [count, f"{USERS:,}" if who == 0 else "one", f"{mine:,.0f}", f"{other:,.0f}", f"{mine / other:.2f}"]
            )
        print_markdown("Cycles per second", ["clients", "users", "trueup", "snipz", "ratio"], rows)
        longer = []
        for name, interpreter, place in (("trueup", sys.executable, url), ("snipz", options.peer, peer_url)):
            with clients(interpreter, name, place, 1) as one:
                rates = [rate(one, f"count {LONG // 20} {LONG_USER}") for _ in range(20)]
            longer.append([name, f"{rates[1]:,.0f}", f"{rates[-1]:,.0f}", f"{rates[-1] / rates[1]:.2f}"])
        print_markdown(f"One user, {LONG:,} cycles", ["", "first", "last", "ratio"], longer)


if __name__ == "__main__":
    main()
