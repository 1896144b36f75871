"""The stack file: where other processes of this home find the URLs of the servers that run."""

import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from trueup.stack.errors import explained
from trueup.stack.locks import mutex

_KEYS = {"postgres": "database_url", "redis": "broker_url"}


class StackFile:
    """`run/stack.json`; it names exactly the embedded servers that run."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def publish(self, service: str, url: str) -> None:
        """Add the URL of a server that has started."""
        self._change(_KEYS[service], url)

    def withdraw(self, service: str) -> None:
        """Take away the URL of a server before it stops; the file goes with the last one."""
        self._change(_KEYS[service], None)

    def _change(self, key: str, url: str | None) -> None:
        # The two services have a mutex each, so that two processes may come here at once: read,
        # change and write under a third, or one of the changes would be lost.
        with mutex(self._path.with_suffix(".mutex"), "stack"), explained("stack", self._path):
            before = self._read()
            after = {name: value for name, value in before.items() if name != key}
            if url:
                after[key] = url
            if after == before:
                return
            if after:
                self._write(after)
            else:
                self._path.unlink(missing_ok=True)

    def _read(self) -> dict[str, str]:
        with suppress(OSError, json.JSONDecodeError):
            content: dict[str, str] = json.loads(self._path.read_text())
            return content
        return {}

    def _write(self, content: dict[str, str]) -> None:
        # mkstemp gives mode 0600; the rename is atomic, so that a reader never sees half a file.
        descriptor, name = tempfile.mkstemp(prefix="stack-", dir=self._path.parent)
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
        os.replace(name, self._path)
