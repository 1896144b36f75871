"""The steps of the demo, in order, and the check of their results."""

import json
import shlex
import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
from celery.result import AsyncResult
from sqlalchemy import text

from trueup.accounts.account import read_account
from trueup.cli.demo import tenants
from trueup.cli.demo.stack import DemoStack
from trueup.cli.demo.tenants import BAKER, DENIED, FLORIST, GUARDED, KESTREL, SEPIDEH, UNGUARDED, Tenant
from trueup.cli.output import print_table
from trueup.cli.reports.terminal import print_summary
from trueup.database.engine import connect
from trueup.database.retry import retrying
from trueup.errors import TokensDenied
from trueup.reports.run_report import read_report
from trueup.settings.settings import get_settings

TASK_SECONDS = 30
MISSED_TOKENS = 1_180
DOUBLED_TOKENS = 640
RACED_TOKENS = 1_800  # of each task without the gate
WORKERS = 2
CENTS_PER_1000 = 100  # the price at which the demo's tenants buy tokens
SHOP = "https://kestrel-outdoor.example/shop"


# Pairs of a condition and the expected result that it proves.
Results = Iterator[tuple[bool, str]]


def run_story(stack: DemoStack) -> list[str]:
    """Run all steps. Returns the expected results that are missing; empty if all steps succeeded."""
    started = time.monotonic()
    missing: list[str] = []
    tenants.create_tenants(stack.engine)
    _reconcile(stack)  # from now on the journal of the counters proves each cause
    for step in (_race, _run_tasks, _deny, _drift):
        missing += [expected for held, expected in step(stack) if not held]
    _next_steps(time.monotonic() - started, get_settings().home)
    return missing


def _heading(title: str) -> None:
    click.echo()
    click.secho(title, bold=True)


def _race(stack: DemoStack) -> Results:
    _heading("1. Two workers race for a user's last tokens: first without the gate, as in many hosts, then with it")
    left = tenants.plan_tokens(UNGUARDED) - UNGUARDED.used_tokens
    admitted = {UNGUARDED: tenants.race_without_gate(stack.engine, UNGUARDED, RACED_TOKENS, WORKERS)}
    sent = [_enqueue(stack, "trueup.generate_qa", GUARDED, _article("help_en.txt")) for _ in range(WORKERS)]
    answers = [result.get(timeout=TASK_SECONDS, propagate=False) for result in sent]
    admitted[GUARDED] = sum(not isinstance(answer, Exception) for answer in answers)
    rows = []
    lost = {}
    for tenant in (UNGUARDED, GUARDED):
        used = tenants.used_tokens(stack.engine, tenant) - tenant.used_tokens
        lost[tenant] = max(used - left, 0)
        worth = lost[tenant] * CENTS_PER_1000 // 1000
        rows.append(
            (
                tenant.name,
                left,
                f"{admitted[tenant]} of {WORKERS}",
                used,
                lost[tenant],
                f"${worth // 100}.{worth % 100:02}",
            )
        )
    print_table(("tenant", "tokens left", "tasks that ran", "tokens used", "overspent", "at $1 per 1,000"), rows)
    yield (lost[UNGUARDED] > 0, "without the gate the race overspends")
    yield (
        admitted[GUARDED] == 1 and lost[GUARDED] == 0,
        "with the gate one of the two tasks runs, and nothing is overspent",
    )


def _run_tasks(stack: DemoStack) -> Results:
    _heading("2. AI tasks pass the gate: it reserves tokens before the work, and trueup charges every call")
    jobs: list[tuple[str, str, Tenant, dict[str, Any], Callable[[Any], str]]] = [
        ("Q&A, English article", "trueup.generate_qa", KESTREL, _article("help_en.txt"), _describe_pairs),
        ("Q&A, Persian article", "trueup.generate_qa", SEPIDEH, _article("help_fa.txt"), _describe_pairs),
        ("Products, page with JSON-LD", "trueup.extract_products", KESTREL, _page("shop.html"), _describe_products),
        ("Products, page without", "trueup.extract_products", KESTREL, _page("shop_plain.html"), _describe_products),
        ("DM about a product", "trueup.send_instagram_dm", KESTREL, _json("comment_product.json"), _describe_message),
        ("DM, fixed text", "trueup.send_instagram_dm", KESTREL, _json("comment_static.json"), _describe_message),
    ]
    sent = [(*job, _enqueue(stack, job[1], job[2], job[3])) for job in jobs]
    rows = []
    for title, _task, tenant, _arguments, describe, result in sent:
        answer = result.get(timeout=TASK_SECONDS)
        spent = _spent(stack, result.id)
        rows.append((title, tenant.name, spent, describe(answer)))
        free = "JSON-LD" in title or "fixed" in title
        yield ((spent == 0) if free else (spent > 0), f"{title}: spent {spent} tokens")
    print_table(("task", "tenant", "tokens", "result"), rows)
    yield (len(stack.graph.requests) >= 2, "two direct messages reached the Graph API")
    for tenant in (KESTREL, SEPIDEH):
        account = retrying(lambda connection, user=tenant.id: read_account(connection, user))  # type: ignore[misc]
        yield (account.held == 0, f"{tenant.name}: no tokens are held")
        yield (account.drift == 0, f"{tenant.name}: the counter equals the log")


def _deny(stack: DemoStack) -> Results:
    _heading("3. The gate denies tasks before any work: one tenant for each reason")
    sent = {
        reason: _enqueue(stack, "trueup.generate_qa", tenant, _article("help_en.txt"))
        for reason, tenant in DENIED.items()
    }
    rows = []
    for reason, result in sent.items():
        try:
            result.get(timeout=TASK_SECONDS)
            rows.append((DENIED[reason].name, "ran", ""))
        except TokensDenied as denied:
            rows.append((DENIED[reason].name, denied.error_code, denied.payload["error"]))
        yield (rows[-1][1] == reason, f"{DENIED[reason].name} is denied with {reason}")
    print_table(("tenant", "error code", "message"), rows)


def _drift(stack: DemoStack) -> Results:
    _heading("4. Two more counters drift, as in legacy hosts")
    tenants.miss_a_decrement(stack.engine, BAKER, MISSED_TOKENS)
    tenants.decrement_twice(stack.engine, FLORIST, DOUBLED_TOKENS)
    before = tenants.counters(stack.engine, BAKER, FLORIST)
    for tenant, how in ((BAKER, "a call was logged but not subtracted"), (FLORIST, "a retried task subtracted twice")):
        account = retrying(lambda connection, user=tenant.id: read_account(connection, user))  # type: ignore[misc]
        click.echo(f"  {tenant.name}: shows {before[tenant.name]:,}, has {account.remaining:,} ({how})")
    _heading("5. The reconcile task finds, explains and corrects the drifts: `trueup drift report`")
    run_id = _reconcile(stack)
    with connect() as connection:
        report = read_report(connection, get_settings().host.user_id_type, run_id)
    if report is None:
        yield (False, "the reconcile run can be reported")
        return
    print_summary(report)
    found = {row.user_id: (row.drift, row.cause, row.action) for row in report.rows}
    yield (UNGUARDED.id in found, "the drift that the race left")
    yield (found.get(BAKER.id) == (MISSED_TOKENS, "missed_decrement", "corrected"), "the missed decrement")
    yield (found.get(FLORIST.id) == (-DOUBLED_TOKENS, "double_decrement", "corrected"), "the double decrement")
    yield (report.drifted == 3, f"three counters had drifted, not {report.drifted}")


def _reconcile(stack: DemoStack) -> int:
    """Compare all counters with the log, by the task that beat sends. Returns the run's number."""
    figures = stack.app.tasks["trueup.reconcile_counters"].apply_async().get(timeout=TASK_SECONDS)
    return int(figures["run_id"])


def _next_steps(seconds: float, home: Path) -> None:
    """Print commands that work as pasted, in any folder: the demo's data stays in `home`."""
    _heading(f"All in {seconds:.0f} s. The demo's data stays. Next:")
    program = shlex.quote(_program())
    click.echo(f"  export TRUEUP_HOME={shlex.quote(str(home))}")
    for command, purpose in (
        (f"tokens show {BAKER.id}", "a user's tokens, and the drift of the host's counter"),
        (f"drift explain {BAKER.id}", "why that counter drifted"),
        (f"run qa --user {KESTREL.id} --wait {shlex.quote(str(_example_file('help_en.txt')))}", "a real task"),
        ("drift report --output drift.html", "the report above as a page"),
        ("up", f"run the stack with this data until Ctrl-C, with its live page, {get_settings().api.local_url}"),
        ("--help", "all commands; README.md shows how to add trueup to your Celery project"),
    ):
        click.echo(f"  {program} {command}    # {purpose}")


def _program() -> str:
    """Return the command that runs this trueup: its name if the shell finds it, else its path."""
    found = shutil.which("trueup")
    beside = Path(sys.executable).parent / "trueup"
    return "trueup" if found and (not beside.exists() or Path(found).samefile(beside)) else str(beside)


def _enqueue(stack: DemoStack, task: str, tenant: Tenant, arguments: dict[str, Any]) -> AsyncResult:
    stack.app.loader.import_default_modules()
    return stack.app.tasks[task].apply_async(kwargs={"user_id": tenant.id, **arguments})


def _spent(stack: DemoStack, task_id: str) -> int:
    """Return the tokens of a task in the usage log."""
    statement = text(
        "SELECT coalesce(sum(total_tokens), 0) FROM public.ai_usage_log WHERE metadata->>'task_id' = :task_id"
    )
    with stack.engine.connect() as connection:
        return int(connection.execute(statement, {"task_id": task_id}).scalar_one())


def _example(name: str) -> str:
    return _example_file(name).read_text(encoding="utf-8")


def _example_file(name: str) -> Path:
    """Return the path of an example file from the repository or the wheel."""
    here = Path(__file__).resolve().parent
    for folder in (here / "examples", here.parent.parent / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"examples/{name}")


def _article(name: str) -> dict[str, Any]:
    return {"text": _example(name), "page_title": "Help", "max_pairs": 4}


def _page(name: str) -> dict[str, Any]:
    return {"html": _example(name), "url": SHOP}


def _json(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(_example(name))
    return content


def _describe_pairs(answer: dict[str, Any]) -> str:
    pairs = answer["pairs"]
    return f"{len(pairs)} pairs, e.g. “{pairs[0]['question']}”" if pairs else "no pairs"


def _describe_products(answer: dict[str, Any]) -> str:
    products = answer["products"]
    first = f"{products[0]['name']}, {products[0]['price']} {products[0]['currency']}" if products else "none"
    return f"{len(products)} products ({answer['source']}), e.g. {first}"


def _describe_message(answer: dict[str, Any]) -> str:
    return f"{answer['status']}: “{textwrap.shorten(answer['message'] or '', 60, placeholder='…')}”"
