"""A working legacy host: a process that writes at full speed, sometimes wrongly, and keeps a record of its writes.

`python -m tests.support.legacy.live_host PLAN.json LEDGER.json`. PLAN has the database, the seed and the subscribers.
LEDGER gets every committed write, in order for each subscription, the errors and the slowest statements. It works until
its standard input ends. Each subscription belongs to one thread, so every loss by the host itself is intended.

Jobs keep the counter that they have read while requests lower it, and other code saves whole objects that it has
read before. Spenders only spend, buyers also buy packs, renewers renew properly, leavers leave and come back. As in
such hosts, the counter is read and written back in separate transactions without a lock.
"""

import json
import math
import random
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psycopg

THREADS = 4
PACK_TOKENS = 20_000
PACK_ID = 3
EMPTY = 45_000
"""A user with fewer tokens than this does not spend, so that the counter is never clamped here."""

# The acts and their frequencies.
SPENDING = {"request": 90, "fail": 5, "miss": 2, "double": 2, "charge_failed": 1, "lose": 1, "job": 2, "save": 1}
ACTS = {
    "spender": SPENDING,
    "buyer": {**SPENDING, "buy": 3},
    "renewer": {**SPENDING, "renew": 3},
    "leaver": {**SPENDING, "leave": 2},
}


class HostThread(threading.Thread):
    """One of the host's threads. `subscriptions` are its own: user, subscription, tokens, role, token and full plan."""

    def __init__(
        self, url: str, subscriptions: list[dict[str, Any]], *, number: int, seed: int, stop: threading.Event
    ) -> None:
        super().__init__(name=f"host-{number}")
        self.url = url
        self.subscriptions = subscriptions
        self.dice = random.Random(f"{seed}/{number}")  # noqa: S311 - it makes a load, and guards nothing
        self.stop = stop
        self.ledger: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.slowest: tuple[float, str] = (0.0, "")
        self.statements = 0
        self._new_ids = 10_000_000 * (number + 1)

    def run(self) -> None:
        options = "-c application_name=host -c lock_timeout=10s -c statement_timeout=20s"
        try:
            with (
                psycopg.connect(self.url, autocommit=True, options=options) as self.first,
                psycopg.connect(self.url, autocommit=True, options=options) as self.second,
            ):
                while not self.stop.is_set():
                    who = self.dice.choice(self.subscriptions)
                    acts = ACTS[who["role"]]
                    act = self.dice.choices(list(acts), list(acts.values()))[0]
                    try:
                        getattr(self, f"_{act}")(who)
                    except psycopg.Error as error:
                        self.errors.append(f"{act}: {error!r}")
        except psycopg.Error as error:
            self.errors.append(f"connection: {error!r}")

    def execute(self, statement: str, *values: Any, on: Any = None) -> Any:
        begun = time.monotonic()
        result = (on or self.first).execute(statement, values)
        taken = time.monotonic() - begun
        self.statements += 1
        if taken > self.slowest[0]:
            self.slowest = (taken, " ".join(statement.split()[:3]))
        return result

    @contextmanager
    def transaction(self, on: Any = None) -> Iterator[None]:
        """Commit as a statement, because a commit may wait too."""
        self.execute("BEGIN", on=on)
        try:
            yield
            self.execute("COMMIT", on=on)
        except BaseException:
            (on or self.first).execute("ROLLBACK")
            raise

    def note(self, who: dict[str, Any], kind: str, **more: Any) -> None:
        """Record a committed write."""
        self.ledger.append({"user": who["user"], "subscription": who["subscription"], "kind": kind, **more})

    # The parts of the acts.

    def _size(self) -> int:
        """Draw a request's tokens: fewer than a pack's, because a loss of a pack's size is ambiguous."""
        return max(7, min(15_000, int(400 * math.exp(self.dice.gauss(0, 1.2)))))

    def _log(self, who: dict[str, Any], tokens: int, *, success: bool = True) -> None:
        self.execute(
            "INSERT INTO ai_usage_log (user_id, section, total_tokens, success, created_at)"
            " VALUES (%s, 'chat', %s, %s, %s)",
            who["user"],
            tokens,
            success,
            datetime.now(UTC),
        )
        self.note(who, "log", tokens=tokens if success else 0)

    def _read(self, who: dict[str, Any], on: Any = None) -> int:
        query = "SELECT tokens_remaining FROM billing_subscription WHERE id = %s"
        (counter,) = self.execute(query, who["subscription"], on=on).fetchone()
        return int(counter)

    def _write(self, who: dict[str, Any], seen: int, tokens: int, on: Any = None) -> None:
        """Write back the lowered counter as it was read, with a decrement row."""
        if self.dice.random() < 0.1:
            time.sleep(self.dice.uniform(0, 0.01))
        after = max(0, seen - tokens)
        with self.transaction(on):
            self.execute(
                "UPDATE billing_subscription SET tokens_remaining = %s, updated_at = now() WHERE id = %s",
                after,
                who["subscription"],
                on=on,
            )
            self.execute(
                "INSERT INTO billing_tokenusage (subscription_id, used_tokens, usage_date, description)"
                " VALUES (%s, %s, %s, 'AI usage: chat')",
                who["subscription"],
                tokens,
                datetime.now(UTC),
                on=on,
            )
        self.note(who, "write", after=after, seen=seen)

    def _can_spend(self, who: dict[str, Any]) -> bool:
        return self._read(who) > EMPTY

    # The acts.

    def _request(self, who: dict[str, Any]) -> None:
        if self._can_spend(who):
            tokens = self._size()
            self._log(who, tokens)
            self._write(who, self._read(who), tokens)

    def _fail(self, who: dict[str, Any]) -> None:
        self._log(who, self._size(), success=False)

    def _miss(self, who: dict[str, Any]) -> None:
        if self._can_spend(who):
            self._log(who, self._size())

    def _double(self, who: dict[str, Any]) -> None:
        if self._can_spend(who):
            tokens = self._size()
            self._log(who, tokens)
            self._write(who, self._read(who), tokens)
            self._write(who, self._read(who), tokens)

    def _charge_failed(self, who: dict[str, Any]) -> None:
        if self._can_spend(who):
            tokens = self._size()
            self._log(who, tokens, success=False)
            self._write(who, self._read(who), tokens)

    def _lose(self, who: dict[str, Any]) -> None:
        """Make two requests at once, each in its own session. Both read before either writes."""
        if self._can_spend(who):
            sizes = self._size(), self._size()
            self._log(who, sizes[0])
            self._log(who, sizes[1])
            first, second = self._read(who), self._read(who, on=self.second)
            self._write(who, first, sizes[0])
            self._write(who, second, sizes[1], on=self.second)
            self.note(who, "lose")

    def _job(self, who: dict[str, Any]) -> None:
        """Load the subscription, and save it less the job's tokens after other requests have lowered the counter."""
        if self._can_spend(who):
            seen, tokens = self._read(who), self._size()
            self._some_requests(who)
            self._log(who, tokens)
            self._write(who, seen, tokens)
            self.note(who, "job")

    def _save(self, who: dict[str, Any]) -> None:
        """Load the subscription, and save the whole object after other requests have lowered the counter."""
        if self._can_spend(who):
            seen = self._read(who)
            self._some_requests(who)
            self.execute(
                "UPDATE billing_subscription SET tokens_remaining = %s, updated_at = now() WHERE id = %s",
                seen,
                who["subscription"],
            )
            self.note(who, "save", after=seen, seen=seen)

    def _some_requests(self, who: dict[str, Any]) -> None:
        for _ in range(self.dice.randint(1, 3)):
            self._request(who)

    def _pay(self, who: dict[str, Any], token_plan: int | None, full_plan: int | None) -> None:
        self.execute(
            "INSERT INTO billing_payment (user_id, subscription_id, token_plan_id, full_plan_id, status, payment_date,"
            " transaction_id) VALUES (%s, %s, %s, %s, 'completed', %s, %s)",
            *(who["user"], who["subscription"], token_plan, full_plan, datetime.now(UTC)),
            f"live-{self.name}-{len(self.ledger)}",
        )

    def _buy(self, who: dict[str, Any]) -> None:
        with self.transaction():
            query = "SELECT tokens_remaining FROM billing_subscription WHERE id = %s FOR UPDATE"
            (seen,) = self.execute(query, who["subscription"]).fetchone()
            after = seen + PACK_TOKENS
            self._pay(who, PACK_ID, None)
            self.execute(
                "UPDATE billing_subscription SET tokens_remaining = %s WHERE id = %s", after, who["subscription"]
            )
        self.note(who, "buy", after=after, tokens=PACK_TOKENS)

    def _renew(self, who: dict[str, Any]) -> None:
        with self.transaction():
            self._pay(who, who["token_plan"], who["full_plan"])
            self.execute(
                "UPDATE billing_subscription SET tokens_remaining = %s, start_date = %s WHERE id = %s",
                who["tokens"],
                datetime.now(UTC),
                who["subscription"],
            )
        self.note(who, "renew", after=who["tokens"])

    def _leave(self, who: dict[str, Any]) -> None:
        """Delete the subscription with all its rows, and subscribe again a moment later."""
        with self.transaction():
            for table in ("billing_tokenusage", "billing_payment"):
                self.execute(f"DELETE FROM {table} WHERE subscription_id = %s", who["subscription"])
            self.execute("DELETE FROM billing_subscription WHERE id = %s", who["subscription"])
        self.note(who, "leave")
        self._new_ids += 1
        who["subscription"] = self._new_ids
        self.execute(
            "INSERT INTO billing_subscription (id, user_id, token_plan_id, full_plan_id, start_date, tokens_remaining)"
            " VALUES (%s, %s, %s, %s, %s, %s)",
            *(who["subscription"], who["user"], who["token_plan"], who["full_plan"], datetime.now(UTC), who["tokens"]),
        )
        self.note(who, "join")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text())
    stop = threading.Event()
    begun = time.monotonic()
    threads = [
        HostThread(
            plan["url"],
            plan["subscriptions"][number::THREADS],
            number=number,
            seed=plan["seed"],
            stop=stop,
        )
        for number in range(THREADS)
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join()
    written = {
        "ledger": [entry for thread in threads for entry in thread.ledger],
        "errors": [error for thread in threads for error in thread.errors],
        "slowest": sorted((thread.slowest for thread in threads), reverse=True),
        "seconds": time.monotonic() - begun,
        "statements": sum(thread.statements for thread in threads),
    }
    Path(sys.argv[2]).write_text(json.dumps(written))


if __name__ == "__main__":
    main()
