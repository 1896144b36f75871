"""Staff of the example shop use Django's admin. Prints as JSON what they see. Runs in the folder of the example."""

import contextlib
import io
import json
import os
import sys
from datetime import timedelta
from typing import Any

import django

sys.path.insert(0, os.getcwd())
os.environ["DJANGO_SETTINGS_MODULE"] = "shop.settings"
LISTS = ("hold", "charge", "reconcilerun", "drift", "gatemode")


def main() -> None:
    django.setup()
    from django.test.utils import setup_test_environment

    setup_test_environment()
    said: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        _prepare()
        _read(said)
        _decide(said)
        _delete_a_user(said)
    sys.stdout.write(json.dumps(said, default=str))


def _prepare() -> None:
    """Four customers whose counters show 500 tokens too much, in review, and two members of the staff."""
    from django.contrib.auth.models import Permission, User
    from django.core.management import call_command
    from django.utils import timezone

    call_command("migrate", verbosity=0)
    plan = model("TokenPlan").objects.create(name="Starter", included_tokens=5_000)
    start = timezone.now() - timedelta(days=2)
    for name in ("ada", "bob", "carol", "dora"):
        user = User.objects.create_user(name)
        model("Subscription").objects.create(user=user, plan=plan, start_date=start, tokens_remaining=6_500)
        model("AIUsage").objects.create(
            user=user, feature="chat", total_tokens=10, created_at=start + timedelta(days=1)
        )
    call_command("trueup", "db", "attach", "--yes")
    call_command("trueup", "reconcile")
    User.objects.create_superuser("root", password="secret")
    reader = User.objects.create_user("reader", password="secret", is_staff=True)
    reader.user_permissions.add(
        *Permission.objects.filter(codename__startswith="view_", content_type__app_label="trueup")
    )


def model(name: str) -> Any:
    """Return a model of the shop's own app `billing`."""
    from django.apps import apps

    return apps.get_model("billing", name)


def client(name: str) -> Any:
    from django.test import Client

    visitor = Client(HTTP_HOST="localhost")
    assert visitor.login(username=name, password="secret")
    return visitor


def messages_of(answer: Any) -> list[str]:
    return [str(one) for one in answer.context["messages"]]


def _read(said: dict[str, Any]) -> None:
    from trueup.django.models import Drift

    root, reader = client("root"), client("reader")
    said["lists"] = {name: root.get(f"/admin/trueup/{name}/").status_code for name in LISTS}
    said["searched"] = {
        term: root.get(f"/admin/trueup/{name}/", {"q": term}).context["cl"].result_count
        for name, term in (("drift", "1"), ("hold", "2"), ("drift", "' OR 1=1"), ("charge", "9" * 30))
    }
    said["drifts"] = Drift.objects.filter(action="review").count()
    page = f"/admin/trueup/drift/{Drift.objects.get(user__username='ada').pk}/change/"
    said["page"] = root.get(page).content.decode()
    said["reader"] = {
        "page": reader.get(page).status_code,
        "has a form": "decide/" in reader.get(page).content.decode(),
        "posts": reader.post(page.replace("change", "decide"), {"choice": "accept", "note": "x"}).status_code,
        "adds": root.get("/admin/trueup/drift/add/").status_code,
        "deletes": root.post(page.replace("change", "delete"), {"post": "yes"}).status_code,
    }


def _decide(said: dict[str, Any]) -> None:
    from django.contrib.admin.models import LogEntry

    from trueup.django.models import Drift

    root = client("root")

    def counter(name: str) -> int:
        return model("Subscription").objects.get(user__username=name).tokens_remaining

    ada = Drift.objects.get(user__username="ada").pk
    decide = f"/admin/trueup/drift/{ada}/decide/"
    said["without a note"] = (messages_of(root.post(decide, {"choice": "accept"}, follow=True)), counter("ada"))
    said["no reference"] = messages_of(root.post(decide, {"choice": "grant", "note": "gift"}, follow=True))
    said["accepted"] = (
        messages_of(root.post(decide, {"choice": "accept", "note": "typo"}, follow=True)),
        counter("ada"),
    )
    said["again"] = (messages_of(root.post(decide, {"choice": "accept", "note": "typo"}, follow=True)), counter("ada"))
    said["log"] = [(one.user.username, one.object_id, one.change_message) for one in LogEntry.objects.all()]
    chosen = [str(Drift.objects.get(user__username=name).pk) for name in ("bob", "carol")]
    action = {"action": "accept_selected", "_selected_action": chosen}
    asked = root.post("/admin/trueup/drift/", action)
    said["asked"] = (asked.template_name, counter("bob"))
    done = root.post("/admin/trueup/drift/", action | {"decide": "1", "note": "checked"}, follow=True)
    said["chosen"] = (messages_of(done), counter("bob"), counter("carol"), counter("dora"))
    everything = root.post("/admin/trueup/drift/", action | {"select_across": "1"}, follow=True)
    said["everything"] = messages_of(everything)


def _delete_a_user(said: dict[str, Any]) -> None:
    from django.contrib.auth.models import User
    from django.core.management import call_command

    from trueup.django.models import Drift

    model("Subscription").objects.filter(user__username="ada").delete()
    model("AIUsage").objects.filter(user__username="ada").delete()
    said["deleted"] = (User.objects.get(username="ada").delete()[1], Drift.objects.count())
    call_command("makemigrations", check=True, dry_run=True)


if __name__ == "__main__":
    main()
