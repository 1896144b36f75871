"""A RabbitMQ of the tests' own on loopback, if this machine has one: its port mapper, its node and its folder."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.waiting import DEADLINE_SECONDS, wait_for

# Distributions put a wrapper on PATH that changes to an account of the service; the server itself is here.
FOLDERS = ("/usr/lib/rabbitmq/bin", "/usr/local/lib/rabbitmq/bin", "/opt/homebrew/opt/rabbitmq/sbin")

# `reader` may not publish to the default exchange, by which Celery sends tasks: its requeues are refused.
DEFINITIONS = """{
  "users": [{"name": "guest", "password": "guest", "tags": "administrator"},
            {"name": "reader", "password": "reader", "tags": ""}],
  "vhosts": [{"name": "/"}],
  "permissions": [{"user": "guest", "vhost": "/", "configure": ".*", "write": ".*", "read": ".*"},
                  {"user": "reader", "vhost": "/", "configure": ".*", "write": "^(?!amq.default$).*$", "read": ".*"}]
}
"""


def find_rabbitmq() -> str | None:
    """Return the server's program, with which Erlang's port mapper is also here; None: not installed."""
    found = shutil.which("rabbitmq-server", path=os.pathsep.join(FOLDERS))
    return found if shutil.which("epmd") else None


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running_rabbitmq(program: str) -> Iterator[int]:
    """Give the port of a RabbitMQ, on which users `guest` and `reader` log in."""
    port, distribution, mapper = _free_port(), _free_port(), str(_free_port())
    with tempfile.TemporaryDirectory(prefix="trueup-test-") as name:
        folder = Path(name)
        (folder / "plugins").write_text("[].")
        (folder / "definitions.json").write_text(DEFINITIONS)
        (folder / "rabbitmq.conf").write_text(f"load_definitions = {folder}/definitions.json\n")
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": name,  # Erlang keeps its cookie here
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_PORT": mapper,
            "RABBITMQ_NODENAME": "trueup-test@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": f"{folder}/data",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_CONFIG_FILE": f"{folder}/rabbitmq.conf",
            "RABBITMQ_CONF_ENV_FILE": f"{folder}/none",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{folder}/plugins",
            # One scheduler that does not spin: other tests need the processors.
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1 +sbwt none",
        }
        epmd = subprocess.Popen(
            [str(shutil.which("epmd")), "-port", mapper, "-address", "127.0.0.1"],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        log = folder / "server.log"
        with log.open("wb") as output:
            server = subprocess.Popen([program], env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            wait_for(lambda: "startup complete" in _log_of(server, log), "RabbitMQ is ready")
            yield port
        finally:
            server.terminate()
            server.wait(DEADLINE_SECONDS)
            epmd.terminate()
            epmd.wait(DEADLINE_SECONDS)


def _log_of(server: subprocess.Popen[bytes], log: Path) -> str:
    assert server.poll() is None, log.read_text()
    return log.read_text(errors="replace")
