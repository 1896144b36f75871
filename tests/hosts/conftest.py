"""The hosts, each started once for a module of tests, on databases of their own."""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.engine import make_url

from tests.conftest import cloned_database, settings_for
from tests.hosts.people import PEOPLE, Person
from tests.hosts.running import (
    Server,
    host_at,
    run_module,
    serving,
    with_either,
    with_own_jwt,
    with_session,
)
from tests.support.host import Host
from tests.support.waiting import wait_for
from trueup.database.engine import transaction
from trueup.host.mapping import HostMapping
from trueup.install.install import install
from trueup.stack import StackUrls


@dataclass
class Site:
    """A host's database. `role`: trueup's role in it. The host logs in with another one."""

    url: str
    role: str
    host: Host
    admin: Engine
    folder: Path

    @property
    def trueup_url(self) -> str:
        return make_url(self.url).set(username=self.role).render_as_string(hide_password=False)

    @contextmanager
    def serving(self, kind: str, application: str, login: object) -> Iterator[Server]:
        log = self.folder / f"{kind}.log"
        with serving(
            kind,
            application,
            log,
            login,
            trueup_url=self.trueup_url,
            host_url=self.url,  # type: ignore[arg-type]
        ) as server:
            yield server

    @contextmanager
    def away_from_trueup(self) -> Iterator[None]:
        """Make the database refuse trueup's connections, and no others."""
        with self.admin.connect() as connection:
            connection.execute(text(f"ALTER ROLE {self.role} NOLOGIN"))
        try:
            wait_for(self._none_of_trueup, "trueup's sessions to end")
            yield
        finally:
            with self.admin.connect() as connection:
                connection.execute(text(f"ALTER ROLE {self.role} LOGIN"))

    def _none_of_trueup(self) -> bool:
        ended = "SELECT count(pg_terminate_backend(pid)) = 0 FROM pg_stat_activity WHERE usename = :role"
        return bool(self.host.value(ended, role=self.role))


@contextmanager
def site(stack: StackUrls, admin_engine: Engine, template: str, factory: pytest.TempPathFactory) -> Iterator[Site]:
    role, folder = f"trueup_{secrets.token_hex(4)}", factory.mktemp("site")
    with (
        pytest.MonkeyPatch.context() as patch,
        cloned_database(stack, admin_engine, template) as url,
        settings_for(url, stack, patch, folder),
        host_at(url) as host,
    ):
        with admin_engine.connect() as connection:
            connection.execute(text(f"CREATE ROLE {role} SUPERUSER LOGIN"))
        yield Site(url=url, role=role, host=host, admin=admin_engine, folder=folder)
        with admin_engine.connect() as connection:
            connection.execute(text(f"DROP ROLE {role}"))


@pytest.fixture(scope="module")
def django_site(stack: StackUrls, admin_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A database made by the Django project's own migrations, and then set up for trueup."""
    with site(stack, admin_engine, "template1", tmp_path_factory) as made:
        run_module("tests.hosts.django_drf.prepare", host_url=made.url)
        with transaction() as connection:
            install(connection, HostMapping(), with_host_tables=False)
        yield made


@pytest.fixture(scope="module")
def plain_site(
    stack: StackUrls, admin_engine: Engine, template_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    """A database with a host's tables, and the same users."""
    with site(stack, admin_engine, template_database, tmp_path_factory) as made:
        for person in PEOPLE:
            sign_up(made.host, person)
        yield made


def sign_up(host: Host, person: Person) -> None:
    host.execute(
        "INSERT INTO accounts_user (id, username, email) VALUES (:id, :name, '')", id=person.id, name=person.name
    )
    if person.tokens is None:
        return
    start = datetime.now(UTC) - timedelta(days=10)
    host.execute(
        "INSERT INTO billing_subscription (id, user_id, token_plan_id, start_date, end_date, is_active, "
        "tokens_remaining) VALUES (:id, :id, :plan, :start, :end, :active, :left)",
        id=person.id,
        plan=host.plan(person.tokens),
        start=start,
        end=start + timedelta(days=5) if person.expired else None,
        active=person.active,
        left=person.tokens - person.used,
    )
    if person.used:
        host.log(person.id, person.used, at=start + timedelta(days=1))


@pytest.fixture(scope="module")
def django_wsgi(django_site: Site) -> Iterator[Server]:
    with django_site.serving("wsgi", "tests.hosts.django_drf.applications:wsgi", with_either) as server:
        yield server


@pytest.fixture(scope="module")
def django_asgi(django_site: Site) -> Iterator[Server]:
    with django_site.serving("asgi", "tests.hosts.django_drf.applications:asgi", with_either) as server:
        yield server


@pytest.fixture(scope="module")
def flask_server(plain_site: Site) -> Iterator[Server]:
    with plain_site.serving("werkzeug", "tests.hosts.flask_app.app:served", with_session) as server:
        yield server


@pytest.fixture(scope="module")
def fastapi_server(plain_site: Site) -> Iterator[Server]:
    with plain_site.serving("asgi", "tests.hosts.fastapi_app.app:app", with_own_jwt) as server:
        yield server
