"""The OpenAPI document is true: Schemathesis sends requests that it allows, and many that it does not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.test_server import served
from tests.support.api import OPERATOR, token
from tests.support.drift_history import add_drift, add_run
from tests.support.host import Host
from tests.support.worker import running_worker
from trueup.api.errors import Denial, Problem
from trueup.gate.denial import Reason
from trueup.monitoring.status import FIGURES
from trueup.settings.api import ApiSettings

CONFIG = Path(__file__).with_name("schemathesis.toml")
DOCUMENTATION = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
OPEN = {"/healthz", "/readyz"}


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


def test_every_operation_declares_its_security_and_its_errors(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            said = set(operation["responses"])
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation["description"], where
            if path in OPEN:
                assert "security" not in operation, where
                continue
            assert operation["security"] == [{"HTTPBearer": []}], where
            assert {"401", "422", "429", "503"} <= said, where
            if path.startswith("/api/drift") or path == "/metrics":
                assert "403" in said, where
            if method == "post":
                assert {"402", "413"} <= said, where
            for code in said - {"200", "202"}:
                (schema,) = [content["schema"] for content in operation["responses"][code]["content"].values()]
                assert schema["$ref"].endswith(("/Problem", "/Denial")), f"{where} {code}"


def test_problems_and_denials_have_valid_examples(document: dict[str, Any]) -> None:
    answers = document["paths"]["/api/drift/runs/{run_id}"]["get"]["responses"]
    for code in ("401", "403", "404", "422", "429", "503"):
        Problem.model_validate(answers[code]["content"]["application/json"]["example"])
    fields = document["components"]["schemas"]["Denial"]["properties"]
    Denial.model_validate(
        {"success": False} | {name: f["examples"][0] for name, f in fields.items() if "examples" in f}
    )
    assert set(fields["error_code"]["enum"]) == set(Reason.__args__)  # type: ignore[attr-defined]


def person(name: str, user: int) -> dict[str, Any]:
    """Return a user in the format of https://github.com/WebFuzzing/Commons, "auth"."""
    header = {"name": "Authorization", "value": f"Bearer {token(user, exp=2**33, scope=OPERATOR)}"}
    return {"name": name, "fixedHeaders": [header]}


@pytest.mark.parametrize(("examples", "seed"), [(4, 1), pytest.param(40, 2, marks=pytest.mark.long)])
def test_schemathesis_finds_no_answer_that_the_document_does_not_allow(
    client: TestClient, document: dict[str, Any], host: Host, tmp_path: Path, examples: int, seed: int
) -> None:
    user, other = host.subscriber(1_000_000), host.subscriber(1_000_000)
    host.log(user, 1234)
    run = add_run(host, drifted=1)
    add_drift(host, run, user, 100, 0, ("missed_decrement", 100))
    people = tmp_path / "people.json"
    people.write_text(json.dumps({"auth": [person("owner", user), person("other", other)]}))
    tool = Path(sys.executable).with_name("schemathesis")
    try:
        with running_worker(tmp_path / "worker.log"), served(tmp_path / "api.log", max_wait_seconds=1) as (_, api):
            asked = subprocess.run(
                [
                    *(tool, "--config-file", CONFIG, "run", str(api.base_url.join("/openapi.json"))),
                    *("--checks", "all", "--seed", str(seed)),
                    *("--max-examples", str(examples), "--continue-on-failure", "--no-color"),
                    *("--auth-wfc", people),
                ],
                cwd=tmp_path,
                capture_output=True,
                text=True,
                check=False,
            )
    finally:
        client.app.state.celery.control.purge()  # type: ignore[attr-defined] - remove the queued tasks
    assert asked.returncode == 0, asked.stdout[-6000:]
    operations = sum(len(methods) for methods in document["paths"].values())
    assert f"Tested: {operations}\n" in asked.stdout
    assert "Traceback" not in (tmp_path / "api.log").read_text()


def test_every_address_setting_and_metric_is_documented(client: TestClient, document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method in operations:
            assert f"`{method.upper()} {path}`" in DOCUMENTATION
    for setting in ApiSettings.model_fields:
        assert f"TRUEUP_API__{setting.upper()}" in DOCUMENTATION
    for name in (*FIGURES, "http_requests_total", "http_request_seconds", "decisions_total", "database_up"):
        assert name.removeprefix("last_reconcile") in DOCUMENTATION
