"""How the shop spends and sells tokens: the log first, the counter later, and the answer is sent in any case.

Each act writes in its own transactions. `at`: its date; None: now.
"""

import logging
import random
import uuid
from datetime import datetime, timedelta

from billing.models import AIUsageLog, Subscription, TokenPlan
from django.db import transaction
from django.utils import timezone

from .books import Books
from .models import Payment, TokenUsage

PACK_TOKENS = 20_000
LATER = timedelta(milliseconds=150)
"""The time from a log row to its decrement, days ago."""

logger = logging.getLogger(__name__)


class Desk:
    """Serves requests. `dice` decides the faults."""

    def __init__(self, books: Books, dice: random.Random) -> None:
        self.books = books
        self.dice = dice

    # The acts of a customer.

    def ask(self, subscription: int, tokens: int | None = None, *, at: datetime | None = None) -> None:
        """Serve one request. A customer without tokens subscribes again."""
        with self.books.step("read"):
            found = Subscription.objects.get(pk=subscription)
        if found.tokens_remaining == 0:
            self.renew(subscription)
            return
        tokens = tokens or self._size()
        self._log(found, tokens, at=at)
        self._decrement(subscription, tokens, at=at)

    def ask_in_vain(self, subscription: int, *, at: datetime | None = None) -> None:
        """A failed request costs nothing."""
        self._log(self._read(subscription), self._size(), success=False, at=at)

    def renew(self, subscription: int) -> None:
        """Start a new term correctly."""
        found = self._read(subscription)
        with self.books.step("renew"), transaction.atomic():
            paid = self._pay(found, found.token_plan, None)
            found.start_date = timezone.now()
            found.tokens_remaining = found.token_plan.tokens_included
            found.save()
        self._enter(found, paid)

    # The faults of counters, one each.

    def miss(self, subscription: int, *, at: datetime | None = None) -> None:
        """An error before the decrement is ignored, so the decrement is missed."""
        tokens = self._size()
        self._log(self._read(subscription), tokens, at=at)
        self._decrement(subscription, tokens, at=at, hiccup=True)

    def lose(self, subscription: int, *, at: datetime | None = None) -> None:
        """Two requests at once: both read the counter before either writes it, and one decrement is lost."""
        requests = [(self._size(), at and at + timedelta(milliseconds=5 * number)) for number in range(2)]
        for tokens, moment in requests:
            self._log(self._read(subscription), tokens, at=moment)
        seen = [self._read(subscription) for _ in requests]
        for (tokens, moment), found in zip(requests, seen, strict=True):
            self._decrement(subscription, tokens, seen=found, at=moment)

    def retry(self, subscription: int, *, at: datetime | None = None) -> None:
        """A retried task decrements twice for one log row."""
        tokens = self._size()
        self._log(self._read(subscription), tokens, at=at)
        for _ in range(2):
            self._decrement(subscription, tokens, at=at)

    def charge_unlogged(self, subscription: int, *, at: datetime | None = None) -> None:
        """The log row is not written, but the decrement is."""
        self._decrement(subscription, self._size(), at=at)

    def charge_in_vain(self, subscription: int, *, at: datetime | None = None) -> None:
        """A failed request is decremented, although it does not count."""
        tokens = self._size()
        self._log(self._read(subscription), tokens, success=False, at=at)
        self._decrement(subscription, tokens, at=at)

    def clamp(self, subscription: int, *, at: datetime | None = None) -> None:
        """The last request costs more than the counter had."""
        self.ask(subscription, self._read(subscription).tokens_remaining + 500, at=at)

    def buy_pack(self, subscription: int, *, at: datetime | None = None) -> None:
        """The counter rises by a pack, but the plan stays the same."""
        self._credit(subscription, TokenPlan.objects.get(name="pack"), at)

    def renew_early(self, subscription: int, *, at: datetime | None = None) -> None:
        """The same plan is bought again before its end. Tokens are added, and the term continues."""
        self._credit(subscription, self._read(subscription).token_plan, at)

    def upgrade(self, subscription: int, *, at: datetime | None = None) -> None:
        """A larger plan is bought: a new term, and the old tokens are carried over."""
        self._credit(subscription, TokenPlan.objects.get(name="large"), at, term=True)

    def burn(self, subscription: int, *, at: datetime | None = None) -> None:
        """At the end of a trial its rest is set to zero."""
        found = self._read(subscription)
        with self.books.step("burn"):
            found.tokens_remaining, found.is_active, found.status = 0, False, "expired"
            found.end_date = found.trial_end = at or timezone.now()
            found.save()
        self._enter(found)

    def edit(self, subscription: int, *, at: datetime | None = None) -> None:
        """A person edits the counter in the admin, to help the user."""
        found = self._read(subscription)
        with self.books.step("edit"):
            found.tokens_remaining += self.dice.choice((-777, 1_234))
            found.save()
        self._enter(found)

    # The parts of the acts.

    def _size(self) -> int:
        return self.dice.randrange(50, 400)

    def _read(self, subscription: int) -> Subscription:
        with self.books.step("read"):
            return Subscription.objects.select_related("token_plan").get(pk=subscription)

    def _log(self, found: Subscription, tokens: int, *, success: bool = True, at: datetime | None = None) -> None:
        with self.books.step("log"):
            row = AIUsageLog.objects.create(
                user_id=found.user_id,
                section="chat",
                prompt_tokens=tokens // 2,
                completion_tokens=tokens - tokens // 2,
                total_tokens=tokens,
                success=success,
                model_name="m",
                created_at=at or timezone.now(),
            )
        self.books.logs.append((str(row.id), found.user_id, tokens, success))

    def _decrement(
        self,
        subscription: int,
        tokens: int,
        *,
        seen: Subscription | None = None,
        at: datetime | None = None,
        hiccup: bool = False,
    ) -> None:
        """Lower the counter as it was read, never below zero. No error is raised: the customer has the answer."""
        try:
            if hiccup:
                raise ConnectionError("the quota service does not answer")
            found = seen or self._read(subscription)
            with self.books.step("decrement"), transaction.atomic():
                found.tokens_remaining = max(0, found.tokens_remaining - tokens)
                found.save()
                TokenUsage.objects.create(
                    subscription_id=subscription,
                    used_tokens=tokens,
                    usage_date=at + LATER if at else timezone.now(),
                    description="AI usage: chat",
                )
        except Exception as error:  # noqa: BLE001 - that is what this project does
            logger.info("the counter of %s was not lowered: %s", subscription, error)
            return
        self._enter(found)
        self.books.decrements.append((subscription, tokens))

    def _credit(self, subscription: int, plan: TokenPlan, at: datetime | None, *, term: bool = False) -> None:
        found = self._read(subscription)
        with self.books.step("credit"), transaction.atomic():
            paid = self._pay(found, plan, at)
            found.tokens_remaining += plan.tokens_included
            if term:
                found.token_plan, found.start_date = plan, at or timezone.now()
            found.save()
        self._enter(found, paid)

    def _pay(self, found: Subscription, plan: TokenPlan, at: datetime | None) -> str:
        return Payment.objects.create(
            user_id=found.user_id,
            subscription=found,
            token_plan=plan,
            payment_date=at or timezone.now(),
            transaction_id=str(uuid.uuid4()),
        ).transaction_id

    def _enter(self, found: Subscription, payment: str | None = None) -> None:
        self.books.counters.append((found.pk, found.tokens_remaining))
        if payment:
            self.books.payments.append(payment)
