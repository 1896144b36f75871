"""The live page in a real browser: keyboard, screen reader, narrow and wide windows, dark and light, with no script."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import Connection

from tests.api.test_server import served
from tests.browser.conftest import overflow, take_picture, violations, wrapped_figures
from tests.cli.conftest import settings, trueup
from tests.support.drift_history import add_run
from tests.support.host import Host
from tests.support.page import credited, drift_in_review
from tests.support.waiting import wait_for
from tests.support.work import charge_tokens, hold_tokens
from tests.support.worker import running_worker
from trueup.database.engine import connect
from trueup.errors import TokensDenied
from trueup.monitoring.page_access import make_link

__all__ = ["settings"]

WIDTHS = (360, 768, 1280, 1920, 3840)
PAGE_BYTES = 100_000


def let_things_happen(host: Host, connection: Connection) -> list[int]:
    """Fill every part of the page. Returns the drifts in review."""
    begin = datetime.now(UTC) - timedelta(days=2)
    for number in range(40):
        add_run(
            host,
            started_at=begin + timedelta(minutes=45 * number + 400 * (number > 25)),
            kind="deep" if number % 20 == 0 else "quick",
            checked=48_211,
            drifted=number % 7,
            corrected=number % 5,
            tokens_overstated=(number * 7_919) % 31_000,
            tokens_understated=(number * 104_729) % 12_000,
        )
    users = [credited(host, 500 + 250 * number) for number in range(4)]
    for number in range(3):
        short = host.subscriber(2_000_000 * (number + 1))
        host.log(short, 1_900_000 * (number + 1))
        hold = hold_tokens(connection, short, 40_000 * (number + 1))
        charge_tokens(connection, hold, 1_200)
        with pytest.raises(TokensDenied):
            hold_tokens(connection, short, 1_000_000_000)
    host.execute(
        "INSERT INTO trueup.alert (key, kind, channel, payload, status, next_attempt_at, created_at) "
        "SELECT 'k' || n, 'tokens', 'webhook', jsonb_build_object('data', jsonb_build_object('message', "
        "'Reconcile run 14 found 131,000 newly drifted tokens of 61 users.')), "
        "CASE n WHEN 1 THEN 'failed' ELSE 'sent' END, now(), now() FROM generate_series(1, 3) n"
    )
    return [drift_in_review(host, user) for user in users]


@contextmanager
def opened(browser: Any, api: httpx.Client, path: str = "/", **options: Any) -> Iterator[Any]:
    """Sign in by a link in a new browser window, and open a page. A complaint in its console fails the test."""
    context = browser.new_context(base_url=str(api.base_url), **options)
    page, complaints = context.new_page(), []
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("pageerror", lambda error: complaints.append(str(error)))
    try:
        with connect() as connection:
            page.goto(f"/login/{make_link(connection, 'ann')}")
        page.get_by_role("button", name="Open the page").click()
        page.wait_for_url("**/")
        if path != "/":
            page.goto(path)
        yield page
        assert complaints == []
    finally:
        context.close()


@pytest.fixture
def api(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    monkeypatch.setenv("TRUEUP_NAME", "Kestrel & Pine")
    with served(tmp_path / "api.log") as (_, client):
        yield client


def test_every_page_is_accessible_fits_every_window_and_breaks_no_figure(
    chromium: Any, axe: str, api: httpx.Client, host: Host, connection: Connection, tmp_path: Path
) -> None:
    drift, *_ = let_things_happen(host, connection)
    for scheme in ("light", "dark"):
        with running_worker(tmp_path / f"worker-{scheme}.log"), opened(chromium, api, color_scheme=scheme) as page:
            wait_for(
                lambda: page.evaluate("document.getElementById('queues').textContent.includes('Workers that answer')")
            )
            for path in ("/", f"/drifts/{drift}", "/docs"):
                if path != "/":
                    page.goto(path, wait_until="load")
                assert violations(page, axe) == [], path
                for width in WIDTHS:
                    page.set_viewport_size({"width": width, "height": 900})
                    assert overflow(page) <= 0, (path, width)
                    if width >= 1280:
                        assert wrapped_figures(page) == [], (path, width)
                page.set_viewport_size({"width": 1280, "height": 900})
                if path == "/":
                    take_picture(page, f"page-{scheme}.png")
                if path == f"/drifts/{drift}" and scheme == "light":
                    take_picture(page, "page-drift.png")
    context = chromium.new_context(base_url=str(api.base_url))
    stranger = context.new_page()
    for path in ("/", "/drifts/none", "/login/a-link-that-was-used-before"):
        stranger.goto(path)
        assert violations(stranger, axe) == [], path
    context.close()


def test_a_change_appears_by_itself_and_is_announced_politely(chromium: Any, api: httpx.Client, host: Host) -> None:
    with opened(chromium, api) as page:
        page.get_by_text("No drift waits for a person.").wait_for()
        page.evaluate("window.isTheSamePage = true")
        user = credited(host)
        page.get_by_role("link", name="Decide about drift").wait_for()
        assert str(user) in page.get_by_role("table", name="Drifts that wait").inner_text()
        assert page.get_by_role("status").text_content() == "1 drift in review."
        assert page.evaluate("window.isTheSamePage")
        # A part with the focus waits until the focus leaves it.
        link = page.get_by_role("link", name="Decide about drift")
        link.focus()
        credited(host)
        wait_for(lambda: page.evaluate("document.getElementById('announcement').textContent === '2 drifts in review.'"))
        assert link.evaluate("(one) => one === document.activeElement")
        page.get_by_role("link", name="HTTP API").focus()
        wait_for(lambda: page.evaluate("document.querySelectorAll('#review tbody tr').length === 2"))


def test_a_drift_is_decided_by_the_keyboard_alone(chromium: Any, api: httpx.Client, host: Host) -> None:
    user = credited(host)
    with opened(chromium, api) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
        assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Decide about drift")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Decide").wait_for()
        page.get_by_role("radio", name="Accept").focus()
        page.keyboard.press("Space")
        while page.evaluate("document.activeElement.name") != "note":
            page.keyboard.press("Tab")
        page.keyboard.type("asked the customer")
        page.keyboard.press("Enter")
        page.get_by_text("Decided: accept").wait_for()
    assert host.counter(user) == 9_400
    assert host.value("SELECT decided_by FROM trueup.drift_decision") == "ann"


def test_the_page_works_without_javascript(chromium: Any, api: httpx.Client, host: Host) -> None:
    user = credited(host)
    drift = drift_in_review(host, user)
    with opened(chromium, api, java_script_enabled=False) as page:
        page.get_by_role("link", name=f"Decide about drift {drift}").click()
        page.get_by_role("radio", name="Ignore").check()
        page.get_by_role("textbox", name="Why").fill("our own account")
        page.get_by_role("button", name="Decide").click()
        page.get_by_text("Decided: ignore").wait_for()
        page.get_by_role("link", name="Back to the review queue").click()
        page.get_by_role("link", name="reload").click()
        page.get_by_text("No drift waits for a person.").wait_for()


def test_a_hidden_page_asks_for_nothing_and_a_shown_one_goes_on(chromium: Any, api: httpx.Client, host: Host) -> None:
    with opened(chromium, api) as page:
        wait_for(lambda: page.evaluate("document.getElementById('state').textContent.startsWith('live')"))
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: true, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        assert page.locator("#state").text_content() == "paused"
        credited(host)
        page.evaluate(
            "Object.defineProperty(document, 'hidden', {value: false, configurable: true});"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        page.get_by_role("link", name="Decide about drift").wait_for()


def test_the_drift_page_is_accessible_and_breaks_no_figure(
    chromium: Any, axe: str, host: Host, connection: Connection, tmp_path: Path, settings: Callable[..., None]
) -> None:
    let_things_happen(host, connection)
    settings(TRUEUP_NAME="Kestrel & Pine")
    file = tmp_path / "drift.html"
    trueup("drift", "report", "--since", "3d", "--output", file)
    for scheme in ("light", "dark"):
        context = chromium.new_context(color_scheme=scheme)
        page = context.new_page()
        page.goto(file.as_uri())
        # The file has a policy of its own, which refuses axe: it is checked without it.
        bare = context.new_page()
        bare.set_content(file.read_text().replace('http-equiv="Content-Security-Policy"', 'name="policy"'))
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            assert overflow(page) <= 0, width
            if width >= 1280:
                assert wrapped_figures(page) == [], width
        assert violations(bare, axe) == []
        page.set_viewport_size({"width": 1280, "height": 900})
        if scheme == "light":
            take_picture(page, "drift-report.png")
        context.close()
