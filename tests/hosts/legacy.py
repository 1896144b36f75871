"""A working Django project, and an engineer at a terminal beside it."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy.engine import make_url

from tests.hosts.documents import ROOT
from tests.hosts.running import plain_url, run_module
from tests.support.dumps import pg_dump, programs
from tests.support.host import Host
from tests.support.waiting import DEADLINE_SECONDS, wait_for

MANAGE = "tests.hosts.django_legacy.manage"


@dataclass
class Shop:
    """The project's database, and a folder for files.

    `host`: the database's superuser, for plain SQL. `took`: seconds of each command.
    """

    url: str
    folder: Path
    host: Host
    took: list[tuple[str, float]] = field(default_factory=list)

    def open(self) -> list[dict[str, Any]]:
        """Make the tables by the project's own migrations, and a history. Returns its books."""
        run_module(MANAGE, "migrate", "--verbosity=0", host_url=self.url)
        run_module(MANAGE, "open_shop", "--books", self.folder / "opened.json", host_url=self.url)
        return self._read("opened.json")

    @contextmanager
    def at_work(self) -> Iterator[list[dict[str, Any]]]:
        """Serve customers in a process of the project's. Gives its books, which are complete at the end."""
        books: list[dict[str, Any]] = []
        process = subprocess.Popen(
            [sys.executable, "-m", MANAGE, "use_ai", "--books", str(self.folder / "served.json")],
            cwd=ROOT,
            env=os.environ | {"HOST_DATABASE_URL": plain_url(self.url), "PYTHONWARNINGS": "error"},
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            yield books
            _, complaints = process.communicate(timeout=DEADLINE_SECONDS)
            assert process.returncode == 0, complaints
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
        books += self._read("served.json")

    def _read(self, name: str) -> list[dict[str, Any]]:
        books: list[dict[str, Any]] = json.loads((self.folder / name).read_text())
        return books

    def goes_on(self) -> None:
        """Return when the project has written counters and log rows for a while longer."""
        for table in ("sales_counterchange", "ai_usage_log"):
            count = f"SELECT count(*) FROM {table}"
            until = self.host.value(count) + 50
            wait_for(lambda count=count, until=until: self.host.value(count) >= until, "the shop to go on")

    def url_of(self, role: str) -> str:
        return make_url(self.url).set(username=role).render_as_string(hide_password=False)

    def trueup(self, *arguments: str, role: str | None = None) -> str:
        """Run the real program as that role. It must succeed. Returns its output."""
        environment = os.environ | ({"TRUEUP_DATABASE_URL": self.url_of(role)} if role else {})
        return self._run([str(Path(sys.executable).with_name("trueup")), *arguments], environment)

    def psql(self, statements: str) -> None:
        """Run statements in psql as the database's superuser. The first error ends them."""
        program = str(programs() / "psql")
        self._run(
            [program, "--quiet", "--set=ON_ERROR_STOP=1", "--no-psqlrc", plain_url(self.url)], os.environ, statements
        )

    def _run(self, command: list[str], environment: Any, given: str = "") -> str:
        begun = time.monotonic()
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=90,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        self.took.append((" ".join(command[1:3]), time.monotonic() - begun))
        return done.stdout

    def structure(self) -> list[str]:
        """Return the database's structure, without the rights of roles."""
        return pg_dump(self.url, "--schema-only", "--no-privileges")
