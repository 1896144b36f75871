"""The wheel in a Django project whose apps are called billing, tasks, api, ai and cli, with a module worker.py.

The project's environment has trueup from the wheel alone, installed by the README's first command. Its settings leave
the broker to the project's own Celery application.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.conftest import cloned_database
from tests.hosts.running import plain_url
from tests.packaging.wheels import ROOT, Environment, build, make_environment
from tests.support.worker import WorkerProcess, running_command
from tests.test_readme import EXAMPLE_URL, FIRST_COMMANDS, FIRST_REPORT, blocks
from trueup.stack import StackUrls

HOST = ROOT / "tests" / "hosts" / "django_drf"
PROJECT = ROOT / "tests" / "packaging" / "project"
MADE_APPS = ("tasks", "api", "ai", "cli")
OWN = ("billing", *MADE_APPS, "worker")

# Django refuses to make an app whose name can already be imported.
START_APPS = f"""
from django.core.management import call_command
for app in {MADE_APPS}:
    call_command("startapp", app)
"""

PEOPLE = """
from accounts.models import User
from billing.models import AIUsageLog, Subscription, TokenPlan
for name, used in (("rich", 0), ("spent", 9_500)):
    user = User.objects.create_user(name, password="secret")
    plan = TokenPlan.objects.create(name=name, tokens_included=10_000)
    Subscription.objects.create(user=user, token_plan=plan, tokens_remaining=10_000)
    if used:
        AIUsageLog.objects.create(user=user, section="chat", total_tokens=used, model_name="m")
"""

CALL_THE_VIEW = """
from base64 import b64encode
from django.test import Client
for name in ("rich", "spent"):
    login = "Basic " + b64encode(f"{name}:secret".encode()).decode()
    answer = Client().post("/gated", headers={"authorization": login})
    print(answer.status_code, answer.json().get("error_code"))
print(Client().post("/gated").status_code)
"""

RUN_THE_TASK = """
from accounts.models import User
from tasks.tasks import summarize
text = "Orders are sent within two days. " * 20
for name in ("rich", "spent"):
    sent = summarize.delay(user_id=User.objects.get(username=name).pk, text=text)
    result = sent.get(timeout=60, propagate=False)
    print(summarize.app.main, type(result).__name__, getattr(result, "error_code", None))
"""

TOP_LEVEL_NAMES = """
import importlib.metadata as m
print([name for name, packages in m.packages_distributions().items() if "trueup" in packages])
"""


@dataclass(frozen=True)
class Project:
    """The project: its folder, its environment, and the variables with the addresses of its servers."""

    folder: Path
    environment: Environment
    variables: dict[str, str]

    def run(self, *command: object, **more: str) -> str:
        return self.environment.run(*command, folder=self.folder, **self.variables | more)

    def manage(self, *arguments: object) -> str:
        return self.run("python", "manage.py", *arguments)

    def celery(self, *arguments: object) -> str:
        return self.run("python", "-m", "celery", "-A", "proj", *arguments)

    def shell(self, code: str) -> list[str]:
        """Run code in the project's shell. Returns the lines that it prints after Django's own."""
        return self.manage("shell", "--verbosity=0", "-c", code).splitlines()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """A fresh environment, in which the README's first command has installed the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    wheel = build("wheel", ROOT, folder / "wheel")
    environment = make_environment(folder / "venv")
    # Without a registry: the wheel is in a folder, and its dependencies are installed.
    offline = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent), "PIP_NO_DEPS": "1"}
    environment.run(*FIRST_COMMANDS[0].split(), folder=folder, **offline, PIP_DISABLE_PIP_VERSION_CHECK="1")
    return environment


@pytest.fixture(scope="module")
def project(
    environment: Environment, stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Project]:
    """The project with its four apps made by `startapp`, its tables by `migrate`, and two users."""
    folder = tmp_path_factory.mktemp("project") / "site"
    shutil.copytree(PROJECT, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for app in ("accounts", "billing"):
        shutil.copytree(HOST / app, folder / app, ignore=shutil.ignore_patterns("__pycache__"))
    with cloned_database(stack, admin_engine, "template1") as url:
        variables = {
            "HOST_DATABASE_URL": plain_url(url),
            "HOST_BROKER_URL": str(stack.broker_url),
            "TRUEUP_DATABASE_URL": url,
            "TRUEUP_HOME": str(folder / "home"),
            "TRUEUP_MODEL_PROVIDER": "offline",
            "PYTHONWARNINGS": "error",
        }
        project = Project(folder, environment, variables)
        project.shell(START_APPS)
        (folder / "tasks" / "tasks.py").write_text(blocks("python")[0])
        project.manage("migrate", "--verbosity=0")
        project.shell(PEOPLE)
        yield project


@pytest.fixture(scope="module")
def attached(project: Project) -> Project:
    """The project after trueup's read-only report and its setup."""
    assert FIRST_COMMANDS[1:] == [f"export TRUEUP_DATABASE_URL={EXAMPLE_URL}", FIRST_REPORT]
    report = project.run(*FIRST_REPORT.split())
    assert "nothing was written" in report
    assert "9,500" in report
    project.run("trueup", "db", "attach", "--yes")
    return project


@pytest.fixture(scope="module")
def worker(attached: Project) -> Iterator[WorkerProcess]:
    """A worker of the project's own application."""
    command = [attached.environment.python, "-m", "celery", "-A", "proj", "worker", "-c", "1", "-l", "INFO"]
    # Celery warns when root runs it.
    variables = attached.environment.variables | attached.variables | {"PYTHONWARNINGS": "default"}
    with running_command(
        command, attached.folder.parent / "worker.log", folder=attached.folder, environment=variables
    ) as worker:
        yield worker


def test_trueup_is_one_name_among_the_hosts(project: Project) -> None:
    assert project.run("python", "-c", TOP_LEVEL_NAMES).strip() == "['trueup']"
    where = "import json, " + ", ".join(OWN) + ", trueup, trueup.tasks, trueup.cli\n"
    where += f"print(json.dumps([module.__file__ for module in ({', '.join(OWN)})]))\n"
    where += "print(json.dumps([module.__file__ for module in (trueup, trueup.tasks, trueup.cli)]))"
    hosts, ours = (map(Path, json.loads(line)) for line in project.run("python", "-c", where).splitlines())
    assert all(path.is_relative_to(project.folder) for path in hosts)
    assert all("site-packages" in path.parts and path.is_relative_to(project.environment.folder) for path in ours)


def test_the_project_passes_djangos_checks(project: Project) -> None:
    assert "no issues" in project.manage("check")


def test_a_view_is_gated_by_the_projects_own_decorator_module(attached: Project) -> None:
    assert attached.shell(CALL_THE_VIEW) == ["200 None", "402 insufficient_tokens", "401"]


def test_the_readmes_task_runs_in_the_projects_own_worker(attached: Project, worker: WorkerProcess) -> None:
    assert attached.shell(RUN_THE_TASK) == ["proj str None", "proj TokensDenied insufficient_tokens"]
    assert "tasks.tasks.summarize" in worker.output
    assert "celery@" in worker.output


def test_the_task_is_found_by_way_of_the_projects_application(attached: Project) -> None:
    """The project's Celery looks for tasks in the installed apps, so Django must be set up before."""
    assert "Summaries" in attached.celery("trueup", "rollout", "list")


def test_doctor_finds_the_installation_and_the_projects_worker_sound(attached: Project, worker: WorkerProcess) -> None:
    broker = {"TRUEUP_BROKER_URL": attached.variables["HOST_BROKER_URL"]}
    alone = attached.run("trueup", "doctor", "--json", **broker)
    inside = attached.celery("trueup", "doctor", "--json")
    for said in (alone, inside):
        document = json.loads(said)
        assert document["errors"] == 0
        assert "ok" in {finding["level"] for finding in document["findings"] if finding["check"] == "workers"}
