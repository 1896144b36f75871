"""PostgreSQL servers of other versions than the embedded one, for the tests to run on."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from trueup.settings.settings import Settings
from trueup.stack.layout import can_pass, prepare_layout
from trueup.stack.processes import run_tool
from trueup.stack.servers.postgres import find_postgres_home

VARIABLE = "TRUEUP_TEST_POSTGRES"
"""Folders with `postgres` and `initdb`. The test session runs on the first, tests/versions on each."""

# Read before a fixture removes trueup's variables from the environment.
GIVEN = [Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]

# The folders of distributions, and of `python -m tests.versions`.
FETCHED = Path(__file__).parents[2] / ".trueup" / "postgres-versions"
_PLACES = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql@*/bin",
    f"{FETCHED}/*/bin",
)


def installed_versions() -> dict[int, Path]:
    """Return the servers by major version, each version once. The folders in `GIVEN` have priority."""
    found: dict[int, Path] = {}
    for programs in (*GIVEN, *_candidates()):
        version = _version(programs)
        if version is not None:
            found.setdefault(version, programs)
    return dict(sorted(found.items()))


def _candidates() -> Iterable[Path]:
    for place in _PLACES:
        yield from sorted(Path("/").glob(place.removeprefix("/")))


def _version(programs: Path) -> int | None:
    if not (programs / "initdb").is_file():
        return None
    said = subprocess.run([programs / "postgres", "--version"], capture_output=True, text=True, check=False)
    match = re.search(r"\(PostgreSQL\) (\d+)", said.stdout)
    return int(match[1]) if match else None


@contextmanager
def running_server(programs: Path, home: Path) -> Iterator[str]:
    """Run the server of that folder in its own home, on a Unix socket. Gives the URL of an empty database."""
    place = find_postgres_home(prepare_layout(Settings(home=home, database_url=None)))
    if place.account is not None and not can_pass(programs / "postgres", place.account):
        programs = Path(shutil.copytree(programs.parent, place.base / "programs", symlinks=True)) / programs.name
        for path in (place.base / "programs").rglob("*"):
            path.chmod(path.stat().st_mode | (0o055 if path.is_dir() or path.parent.name == "bin" else 0o044))

    def run(program: str, *arguments: str) -> None:
        done = run_tool([str(programs / program), *arguments], place.account)
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"

    place.data.mkdir(mode=0o700)
    if place.account is not None:
        os.chown(place.data, place.account.uid, place.account.gid)
    run("initdb", "-D", str(place.data), "--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C")
    options = f"-c listen_addresses= -c unix_socket_directories={place.sockets} -c timezone=UTC"
    log = str(place.data / "log")
    run("pg_ctl", "-D", str(place.data), "-w", "-t", "60", "-l", log, "-o", options, "start")
    try:
        yield f"postgresql+psycopg://postgres@/postgres?host={quote(str(place.sockets))}&port=5432"
    finally:
        run("pg_ctl", "-D", str(place.data), "-w", "-m", "immediate", "stop")
