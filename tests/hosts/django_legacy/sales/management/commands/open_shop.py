"""Sell plans to customers, with faults in some of their histories, dated days ago: `manage open_shop`."""

import random
from argparse import ArgumentParser
from datetime import timedelta
from pathlib import Path
from typing import Any

from accounts.models import User
from billing.models import Subscription, TokenPlan
from django.core.management.base import BaseCommand
from django.utils import timezone

from tests.hosts.django_legacy.sales.books import Books, write
from tests.hosts.django_legacy.sales.spending import PACK_TOKENS, Desk

FAULTS = (
    *("miss", "lose", "retry", "charge_unlogged", "charge_in_vain", "clamp", "buy_pack", "renew_early", "upgrade"),
    *("burn", "edit"),
)
PLANS = {"small": 5_000, "large": 60_000, "pack": PACK_TOKENS, "busy": 400_000, "spent": 2_000}


class Command(BaseCommand):
    help = "Sell plans, and make a history."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--busy", type=int, default=60, help="customers for use_ai")
        parser.add_argument("--idle", type=int, default=3, help="customers for each fault, who only have a history")
        parser.add_argument("--books", type=Path, required=True)

    def handle(self, *_: Any, busy: int, idle: int, books: Path, **__: Any) -> None:
        for name, tokens in PLANS.items():
            TokenPlan.objects.create(name=name, tokens_included=tokens)
        self.began = timezone.now() - timedelta(days=10)
        self.books = Books()
        desk = Desk(self.books, random.Random(1))  # noqa: S311 - it makes a load, and guards nothing
        for number in range(busy):
            self.subscribe(f"busy{number}", "busy")
        self.subscribe("rich", "busy")
        desk.ask(self.subscribe("spent", "spent"), PLANS["spent"], at=self.began + timedelta(hours=1))
        for fault in FAULTS:
            for number in range(idle):
                subscription = self.subscribe(f"idle-{fault}-{number}", "small")
                for hour in range(1, 7):
                    desk.ask(subscription, at=self.began + timedelta(hours=hour))
                getattr(desk, fault)(subscription, at=self.began + timedelta(days=5, minutes=number))
        write([self.books], books)

    def subscribe(self, name: str, plan: str) -> int:
        bought = TokenPlan.objects.get(name=plan)
        user = User.objects.create(username=name, email=f"{name}@example.com")
        made = Subscription.objects.create(
            user=user, token_plan=bought, start_date=self.began, tokens_remaining=bought.tokens_included
        )
        return int(made.pk)
