"""A PgBouncer in transaction mode in front of the tests' PostgreSQL, if this machine has one."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy.engine import make_url

from tests.stack.helpers import temporary_home
from tests.support.waiting import DEADLINE_SECONDS, wait_for
from trueup.settings.settings import Settings
from trueup.stack.layout import prepare_layout
from trueup.stack.servers.postgres import find_postgres_home

VARIABLE = "TRUEUP_TEST_PGBOUNCER"
GIVEN = os.environ.get(VARIABLE)
"""The program, if it is not on PATH. It is read before a fixture removes trueup's variables from the environment."""

PORT = 6432


def find_pgbouncer() -> str | None:
    """Return the program. Distributions install it in a folder that only root has on PATH."""
    return GIVEN or shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")


@contextmanager
def running_pgbouncer(program: str, url: str, *, users: list[str], pool_size: int) -> Iterator[str]:
    """Give the URL of the same database through a pool of so few sessions, in transaction mode.

    All other options are PgBouncer's defaults.
    """
    direct = make_url(url)
    with temporary_home() as home:
        place = find_postgres_home(prepare_layout(Settings(home=home, database_url=None)))
        folder = place.sockets
        (folder / "users.txt").write_text("".join(f'"{user}" ""\n' for user in users))
        (folder / "pgbouncer.ini").write_text(
            f"""
            [databases]
            * = host={direct.query["host"]} port={direct.query["port"]}
            [pgbouncer]
            pool_mode = transaction
            default_pool_size = {pool_size}
            listen_port = {PORT}
            unix_socket_dir = {folder}
            auth_type = trust
            auth_file = {folder}/users.txt
            logfile = {folder}/log
            """.replace("            ", "")
        )
        account = {}
        if place.account is not None:  # PgBouncer refuses to run as root
            account = {"user": place.account.uid, "group": place.account.gid}
            for path in (folder, *folder.iterdir()):
                os.chown(path, place.account.uid, place.account.gid)
        process = subprocess.Popen([program, "-q", str(folder / "pgbouncer.ini")], start_new_session=True, **account)
        try:
            wait_for(lambda: _answers(process, folder), "PgBouncer")
            lent = direct.set(query={"host": str(folder), "port": str(PORT)})
            yield lent.render_as_string(hide_password=False)
        finally:
            process.terminate()
            process.wait(DEADLINE_SECONDS)


def _answers(process: subprocess.Popen[bytes], folder: Path) -> bool:
    assert process.poll() is None, (folder / "log").read_text()
    return (folder / f".s.PGSQL.{PORT}").exists()
