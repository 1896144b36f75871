"""A real `trueup api` is called over HTTP while tokens are spent."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from pydantic import SecretStr
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from tests.support.api import SECRET, free_port, token
from tests.support.books import assert_true
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from trueup.billing.decorators import ai_tokens
from trueup.billing.utils import get_accurate_tokens_remaining
from trueup.settings.api import ApiSettings
from trueup.settings.settings import Settings
from trueup.stack.commands import page_settings
from trueup.stack.supervisor import about_the_api, commands_of
from trueup.worker.http import listening_socket

TRUEUP = Path(sys.executable).with_name("trueup")
# The specification's three calls.
CALLS = ("/api/accounts/overview", "/api/billing/overview", "/api/billing/subscription")


@contextmanager
def served(log: Path, **settings: object) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Serve the API on this process's database until the block ends. Yields the process and a client."""
    port = free_port()
    added = {"jwt_secret": SECRET, "port": port, "rate_limit_per_minute": 0} | settings
    environment = os.environ | {f"TRUEUP_API__{k.upper()}": str(v) for k, v in added.items() if v is not None}
    with log.open("wb") as output:
        process = subprocess.Popen([TRUEUP, "api"], stdout=output, stderr=output, env=environment)
    limits = httpx.Limits(max_connections=50)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=30, trust_env=False) as client:

        def answers() -> bool:
            if process.poll() is not None:
                return True
            try:
                return client.get("/healthz").status_code == 200
            except httpx.TransportError:
                return False

        try:
            wait_for(answers, "the API answers")
            assert process.poll() is None, log.read_text()
            yield process, client
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)


def figures(body: dict[str, Any]) -> tuple[int, int, int, int]:
    """Return original, consumed and remaining tokens, and `tokens_remaining`, from any of the three calls."""
    current = body.get("current_subscription", body)
    usage = current["ai_usage"]
    if "token_usage_remaining" in body:
        share = usage["actual_tokens_remaining"] / usage["original_tokens_included"]
        assert body["token_usage_remaining"] == round(100 * share, 1)
    if "ai_tokens_total" in body:
        assert body["ai_tokens_total"] == usage["total_tokens_consumed"]
        assert body["original_tokens_included"] == usage["original_tokens_included"]
        assert body["actual_tokens_remaining"] == usage["actual_tokens_remaining"]
    return (
        usage["original_tokens_included"],
        usage["total_tokens_consumed"],
        usage["actual_tokens_remaining"],
        current["tokens_remaining"],
    )


def get(client: httpx.Client, path: str, bearer: object) -> dict[str, Any]:
    """Return the answer to a call with this bearer token."""
    answer = client.get(path, headers={"Authorization": f"Bearer {bearer}"})
    answer.raise_for_status()
    body: dict[str, Any] = answer.json()
    return body


def spend_as_the_host(host: Host, user: int, stop: threading.Event) -> int:
    """Log usage of 7 tokens at a time. Returns the total."""
    engine, spent = create_engine(host.engine.url, poolclass=NullPool), 0
    with Host(engine) as spender:
        while not stop.is_set():
            spender.log(user, 7)
            spent += 7
    return spent


def spend_through_the_gate(user: int, stop: threading.Event) -> int:
    """Hold 100 tokens, charge 7 and release the rest, repeatedly. Returns the total charged."""
    spent = 0
    while not stop.is_set():
        with ai_tokens(user, 100) as hold:
            hold.charge(prompt_tokens=5, completion_tokens=2, model_name="m")
        spent += 7
    return spent


def test_the_specifications_calls_show_the_same_counts_while_tokens_are_spent(host: Host, tmp_path: Path) -> None:
    user = host.subscriber(1_000_000)
    stop, signed = threading.Event(), token(user, exp=2**31)
    with served(tmp_path / "api.log") as (_, client):

        def call(path: str) -> tuple[int, int, int, int]:
            return figures(get(client, path, signed))

        with ThreadPoolExecutor(5) as pool:
            spenders = [
                pool.submit(spend_as_the_host, host, user, stop),
                pool.submit(spend_through_the_gate, user, stop),
            ]
            try:
                seen = list(pool.map(call, CALLS * 30))
            finally:
                stop.set()
            assert all(spender.result() > 0 for spender in spenders)
            spent = sum(spender.result() for spender in spenders)
        for original, consumed, remaining, shown in seen:
            assert original == 1_000_000
            assert original - consumed == remaining == shown
            assert consumed % 7 == 0
        assert len({consumed for _, consumed, _, _ in seen}) > 10  # tokens were spent meanwhile

        assert 0 < spent == host.used(user)
        original, consumed, remaining = get_accurate_tokens_remaining(user)
        assert (original, consumed) == (1_000_000, spent)
        assert [call(path) for path in CALLS] == [(original, consumed, remaining, remaining)] * 3
    assert_true(host)


def test_the_demo_is_served_as_documented(host: Host, tmp_path: Path) -> None:
    user = host.subscriber(10_000)
    host.log(user, 1500)
    log = tmp_path / "api.log"
    with served(log, jwt_secret=None, demo=True) as (process, client):
        assert [figures(get(client, path, user)) for path in CALLS] == [(10_000, 1500, 8500, 8500)] * 3
        assert "server" not in client.get("/healthz").headers
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_SECONDS) in (0, -signal.SIGINT)
    assert "Traceback" not in log.read_text()


def test_without_a_key_the_api_does_not_start(database: str) -> None:
    refused = subprocess.run([TRUEUP, "api"], capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=False)
    assert refused.returncode == 1
    assert "TRUEUP_API__JWT_SECRET" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_trueup_up_serves_the_page_to_this_machine_without_a_key_and_never_to_others(tmp_path: Path) -> None:
    def up(**api: Any) -> tuple[list[str], str]:
        settings = Settings(home=tmp_path, api=ApiSettings(port=port, **api))
        names = [command.name for command in commands_of(settings, tmp_path)]
        return names, about_the_api(settings, is_served="api" in names)

    port = free_port()
    without, keyed, everywhere = up(), up(jwt_secret=SecretStr(SECRET)), up(host="0.0.0.0")  # noqa: S104 - refused
    assert without[0] == keyed[0] == ["worker", "reconcile", "beat", "api"]
    assert "this machine alone" in without[1]
    assert f"http://127.0.0.1:{port}" in keyed[1]
    assert SECRET not in keyed[1]
    assert everywhere[0] == ["worker", "reconcile", "beat"]
    assert "TRUEUP_API__JWT_SECRET" in everywhere[1]
    with listening_socket("127.0.0.1", port):  # such as Django's runserver
        taken = up()
    assert taken[0] == ["worker", "reconcile", "beat"]
    assert "another program uses" in taken[1]
    assert "TRUEUP_API__PORT" in taken[1]


def test_the_page_of_an_embedded_database_is_open_and_that_of_a_real_one_asks_for_a_link(tmp_path: Path) -> None:
    name, database = "TRUEUP_API__LOCAL_PAGE", "postgresql://127.0.0.1/shop"
    assert page_settings(Settings(home=tmp_path, database_url=None)) == {name: "open"}
    assert page_settings(Settings(home=tmp_path, database_url=database)) == {name: "login"}
    assert page_settings(Settings(home=tmp_path, api=ApiSettings(jwt_secret=SecretStr(SECRET)))) == {}
    assert page_settings(Settings(home=tmp_path, api=ApiSettings(host="10.0.0.7"))) == {}
