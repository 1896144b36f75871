"""Serve the busy customers until standard input ends: `manage use_ai --books FILE`."""

import random
import sys
import threading
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from billing.models import Subscription
from django.core.management.base import BaseCommand
from django.db import DatabaseError, connection

from tests.hosts.django_legacy.sales.books import Books, write
from tests.hosts.django_legacy.sales.spending import Desk

SPENDING = {"ask": 160, "ask_in_vain": 8, "miss": 4, "lose": 3, "retry": 3, "charge_in_vain": 2, "charge_unlogged": 1}
ACTS = {**SPENDING, "renew": 2, "buy_pack": 2, "renew_early": 1, "upgrade": 1, "edit": 1}
PAUSE_SECONDS = 0.1
"""Between two acts of a thread. Without it, the project would take all processors from trueup."""

SHARED_EVERY = 6
"""One of so many customers is served by every thread at once, and only spends."""


class Command(BaseCommand):
    help = "Serve customers until standard input ends."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--books", type=Path, required=True, help="gets what was committed, at the end")
        parser.add_argument("--threads", type=int, default=4)

    def handle(self, *_: Any, books: Path, threads: int, **__: Any) -> None:
        customers = list(
            Subscription.objects.filter(user__username__startswith="busy").order_by("pk").values_list("pk", flat=True)
        )
        shared = customers[::SHARED_EVERY]
        alone = [customer for customer in customers if customer not in shared]
        stopping = threading.Event()
        workers = [Worker(number, shared, alone[number::threads], stopping) for number in range(threads)]
        for worker in workers:
            worker.start()
        sys.stdin.read()
        stopping.set()
        for worker in workers:
            worker.join()
        write([worker.books for worker in workers], books)


class Worker(threading.Thread):
    """One of the project's threads, with its own connection. `shared`: customers of all threads. `alone`: its own."""

    def __init__(self, number: int, shared: list[int], alone: list[int], stopping: threading.Event) -> None:
        super().__init__(name=f"shop-{number}")
        self.books = Books()
        self.dice = random.Random(number)  # noqa: S311 - it makes a load, and guards nothing
        self.shared, self.alone, self.stopping = shared, alone, stopping

    def run(self) -> None:
        desk = Desk(self.books, self.dice)
        while not self.stopping.wait(PAUSE_SECONDS):
            shares = self.dice.random() < 0.3
            acts = SPENDING if shares else ACTS
            act = self.dice.choices(list(acts), list(acts.values()))[0]
            try:
                getattr(desk, act)(self.dice.choice(self.shared if shares else self.alone))
            except DatabaseError:
                continue  # the books record it
        connection.close()
