"""The files of `deploy/` run the commands of `trueup up` and name metrics that the API serves."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from trueup.api.views.metrics import Metrics
from trueup.monitoring.status import FIGURES
from trueup.stack.commands import Command, stack_commands

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
COMMANDS = {command.name: command for command in stack_commands(Path("/var/lib/trueup"))}
# `rate` and `histogram_quantile` read series whose names the metric's kind gives them.
SERIES = re.compile(r"\btrueup_\w+?(?=_total\b|_bucket\b|\b)")


def manifests(name: str) -> list[Any]:
    return list(YAML(typ="safe").load_all(DEPLOY / f"kubernetes/{name}.yaml"))


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda command: command.name)
def test_kubernetes_runs_the_same_commands_as_trueup_up(command: Command) -> None:
    pod = manifests(command.name)[0]["spec"]["template"]["spec"]
    assert tuple(pod["containers"][0]["command"]) == command.tokens


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_systemd_unit_runs_the_same_command_as_trueup_up(unit: Path) -> None:
    [started] = re.findall(r"^ExecStart=/opt/trueup/bin/(.*)$", unit.read_text(), re.MULTILINE)
    command = COMMANDS[unit.stem.removeprefix("trueup-")]
    assert tuple(shlex.split(started.replace("%%", "%"))) == command.tokens


def test_each_process_has_a_unit_and_a_manifest() -> None:
    assert {unit.stem.removeprefix("trueup-") for unit in UNITS} == set(COMMANDS)
    base = YAML(typ="safe").load(DEPLOY / "kubernetes/kustomization.yaml")
    assert set(base["resources"]) == {f"{name}.yaml" for name in ("migrate", *COMMANDS)}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_finds_no_fault_in_a_unit(unit: Path, tmp_path: Path) -> None:
    if not shutil.which("systemd-analyze"):
        pytest.skip("NOT TESTED: no systemd-analyze here")
    copy = tmp_path / unit.name
    copy.write_text(unit.read_text().replace("/opt/trueup/bin", str(Path(sys.executable).parent)))
    found = subprocess.run(["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


def test_kustomize_gives_every_pod_its_settings_and_takes_its_rights() -> None:
    if not shutil.which("kubectl"):
        pytest.skip("NOT TESTED: no kubectl here")
    built = subprocess.run(["kubectl", "kustomize", DEPLOY / "kubernetes"], capture_output=True, text=True, check=True)
    pods = {
        one["metadata"]["name"]: one["spec"]["template"]["spec"]
        for one in YAML(typ="safe").load_all(built.stdout)
        if one["kind"] in ("Deployment", "Job")
    }
    assert set(pods) == {f"trueup-{name}" for name in ("migrate", *COMMANDS)}
    for pod in pods.values():
        [container] = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert {"secretRef": {"name": "trueup"}} in container["envFrom"]
        assert "/etc/trueup" in [mount["mountPath"] for mount in container["volumeMounts"]]


@pytest.mark.parametrize("name", ["prometheus-rules.yml", "grafana-dashboard.json"])
def test_every_metric_that_is_watched_is_served(name: str, database: str) -> None:
    file = DEPLOY / "monitoring" / name
    text = file.read_text()
    used = set(SERIES.findall(text))
    served = set(re.findall(r"^# TYPE (\w+?)(?:_total)? ", Metrics().exposition().decode(), re.MULTILINE))
    assert len(used) > 5
    # In an empty database some of the figures have no value yet.
    assert used <= served | {f"trueup_{figure}" for figure in FIGURES}
    if file.suffix == ".json":
        assert all(panel["targets"] for panel in json.loads(text)["panels"])
