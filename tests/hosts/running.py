"""A running host: its process, its address, its users, and their login."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import httpx
import jwt
from sqlalchemy.engine import make_url

from tests.hosts.documents import ROOT
from tests.hosts.people import JWT_SECRET, PASSWORD, Person
from tests.support.host import Host, pooled_engine

STOP_SECONDS = 10


class Login(Protocol):
    """How a host's users log in."""

    def __call__(self, client: httpx.Client, person: Person) -> None:
        """Make the client this person from now on."""


@dataclass
class Server:
    """A host in a process of its own, at a free port."""

    url: str
    login: Login
    clients: dict[Person | None, httpx.Client] = field(default_factory=dict)

    def client(self, person: Person | None) -> httpx.Client:
        """Return a client that has logged in as this person. None: not logged in."""
        if person not in self.clients:
            client = httpx.Client(base_url=self.url, timeout=30)
            if person is not None:
                self.login(client, person)
            # Kept only after the login, so that a failed login does not affect every later test.
            self.clients[person] = client
        return self.clients[person]

    def post(self, path: str, person: Person | None, **more: object) -> httpx.Response:
        return self.client(person).post(path, **more)  # type: ignore[arg-type]


@contextmanager
def serving(
    kind: str, application: str, log: Path, login: Login, *, trueup_url: str, host_url: str
) -> Iterator[Server]:
    """Run a host until the block ends. Its environment has its own database URL and trueup's."""
    environment = os.environ | {
        "TRUEUP_DATABASE_URL": trueup_url,
        "HOST_DATABASE_URL": plain_url(host_url),
        "PYTHONWARNINGS": "error",
    }
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.hosts.serve", kind, application],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    server = None
    try:
        assert process.stdout is not None
        port = process.stdout.readline().strip()
        assert port, log.read_text()
        server = Server(url=f"http://127.0.0.1:{port}", login=login)
        yield server
    finally:
        for client in server.clients.values() if server else ():
            client.close()
        process.terminate()
        process.communicate(timeout=STOP_SECONDS)


def run_module(module: str, *arguments: object, host_url: str) -> str:
    """Run one of the hosts' own commands to its end. Returns its output."""
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"HOST_DATABASE_URL": plain_url(host_url)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout


def plain_url(url: str) -> str:
    """Return a URL of SQLAlchemy's in the form of libpq."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


@contextmanager
def host_at(url: str) -> Iterator[Host]:
    """Give plain SQL on the host's own tables."""
    engine = pooled_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with Host(engine) as host:
        yield host
    engine.dispose()


def with_simplejwt(client: httpx.Client, person: Person) -> None:
    answer = client.post("/api/token/", json={"username": person.name, "password": PASSWORD})
    client.headers["Authorization"] = f"Bearer {answer.raise_for_status().json()['access']}"


def with_session(client: httpx.Client, person: Person) -> None:
    client.post("/login", data={"username": person.name, "password": PASSWORD}).raise_for_status()


def with_either(client: httpx.Client, person: Person) -> None:
    with_simplejwt(client, person)
    with_session(client, person)


def with_own_jwt(client: httpx.Client, person: Person) -> None:
    client.headers["Authorization"] = f"Bearer {jwt.encode({'user_id': person.id}, JWT_SECRET, algorithm='HS256')}"
