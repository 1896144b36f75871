"""Reconcile reports are shown page by page, to operators only."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from tests.support.api import OPERATOR, bearer
from tests.support.drift_history import add_drift, add_run
from tests.support.host import Host
from tests.support.schemas import complaints
from trueup.database.engine import get_engine
from trueup.host.mapping import HostMapping
from trueup.reconcile.local_run import reconcile

SCHEMA = "drift-report.schema.json"


def ask(client: TestClient, path: str, **query: Any) -> httpx.Response:
    return client.get(f"/api/drift/{path}", params=query, headers=bearer(None, sub="ops", scope=OPERATOR))


def get(client: TestClient, path: str, **query: Any) -> dict[str, Any]:
    answer = ask(client, path, **query)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


def test_before_the_first_run_the_list_is_empty(client: TestClient) -> None:
    assert get(client, "runs") == {"schema_version": 1, "runs": [], "next_before": None}


def test_pages_list_every_run_once_newest_first(client: TestClient, host: Host) -> None:
    numbers = [add_run(host, checked=number) for number in range(7)]
    seen, pages, before = [], 0, {}
    while True:
        page = get(client, "runs", limit=3, **before)
        seen += [run["run_id"] for run in page["runs"]]
        pages += 1
        if page["next_before"] is None:
            break
        before = {"before": page["next_before"]}
    assert seen == numbers[::-1]
    assert pages == 3
    assert get(client, "runs", limit=7)["next_before"] is None


def test_pages_of_a_run_list_every_row_largest_drift_first(client: TestClient, host: Host) -> None:
    run = add_run(host, checked=5, drifted=5)
    users = [host.subscriber() for _ in range(5)]
    for size, user in enumerate(users, 1):
        add_drift(host, run, user, 100 * size, 0, ("missed_decrement", 100 * size))
    seen, skip = [], 0
    while skip is not None:
        page = get(client, f"runs/{run}", limit=2, skip=skip)
        seen += [(row["user_id"], row["drift"]) for row in page["rows"]]
        assert page["rows_left_out"] == 5 - len(seen)
        assert page["drifted"] == 5
        skip = page["next_skip"]
    assert seen == [(user, 100 * size) for size, user in reversed(list(enumerate(users, 1)))]
    assert get(client, f"runs/{run}", skip=5)["rows"] == []


def test_the_report_of_a_real_run_fits_the_published_schema(client: TestClient, host: Host, tmp_path: Path) -> None:
    user = host.subscriber(1000, counter=900)
    host.log(user, 300)
    reconcile(get_engine(), HostMapping())
    (run,) = get(client, "runs")["runs"]
    report = get(client, f"runs/{run['run_id']}")
    assert (run["drifted"], report["drifted"]) == (1, 1)
    assert [(row["user_id"], row["observed"], row["expected"]) for row in report["rows"]] == [(user, 900, 700)]
    assert complaints(report, SCHEMA) == []


@pytest.mark.parametrize("run", [1, 2**63 - 1])
def test_a_missing_run_is_404(client: TestClient, run: int) -> None:
    answer = ask(client, f"runs/{run}")
    assert (answer.status_code, answer.json()["error_code"]) == (404, "not_found")


@pytest.mark.parametrize(
    ("path", "query", "named"),
    [
        ("runs", {"limit": 0}, "limit"),
        ("runs", {"limit": 201}, "limit"),
        ("runs", {"before": 0}, "before"),
        ("runs", {"limt": 5}, "limt"),
        ("runs/0", {}, "run_id"),
        (f"runs/{2**63}", {}, "run_id"),
        ("runs/latest", {}, "run_id"),
        ("runs/1", {"skip": -1}, "skip"),
    ],
)
def test_wrong_parameters_are_refused_by_name(client: TestClient, path: str, query: dict[str, Any], named: str) -> None:
    answer = ask(client, path, **query)
    assert (answer.status_code, answer.json()["error_code"]) == (422, "invalid_input")
    assert named in answer.json()["error"]
