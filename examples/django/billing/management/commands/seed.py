"""Three customers: ada has tokens left, bob has none, and carol's counter has drifted."""

from django.contrib.auth import get_user_model
from django.core.management.base import BaseCommand

from billing.models import AIUsage, Subscription, TokenPlan

# Name, tokens used, and the tokens that the counter shows. The plan includes 5,000.
CUSTOMERS = [("ada", 1_200, 3_800), ("bob", 5_000, 0), ("carol", 2_000, 4_400)]


class Command(BaseCommand):
    help = "Add three customers with their usage."

    def handle(self, **options):
        plan, _ = TokenPlan.objects.get_or_create(name="Starter", included_tokens=5_000)
        for name, used, shown in CUSTOMERS:
            user = get_user_model().objects.create_user(name)
            Subscription.objects.create(user=user, plan=plan, tokens_remaining=shown)
            for part in (used // 2, used - used // 2):
                AIUsage.objects.create(user=user, feature="chat", total_tokens=part)
            self.stdout.write(f"{name} is user {user.pk}")
