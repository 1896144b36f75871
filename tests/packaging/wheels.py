"""Wheels built from the checkout and from archives of it, and an environment that has one and no checkout."""

import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 120
# An editable installation leaves these beside the dependencies, and they lead back to the checkout.
CHECKOUT = ("trueup", "_trueup", "__editable__")


def run(command: list[object], folder: Path, environment: Mapping[str, str]) -> str:
    """Run a program, which must succeed. Returns its output."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT_SECONDS,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Return this process's environment without settings of trueup, Python and pip."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("TRUEUP_", "PYTHON", "PIP_"))}


def build(kind: str, source: Path, target: Path) -> Path:
    """Build a "wheel" or an "sdist" of a source folder, with the build backend of this environment."""
    run([sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target], source, clean_environment())
    [built] = target.iterdir()
    return built


def unpack(sdist: Path, target: Path) -> Path:
    """Return the one folder in an sdist."""
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    [folder] = target.iterdir()
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    """Return every file of a wheel by its name."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@dataclass(frozen=True)
class Environment:
    """A virtual environment. `variables`: the environment of its programs, with PATH."""

    folder: Path
    variables: dict[str, str]

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def run(self, *command: object, folder: Path, **variables: str) -> str:
        return run(list(command), folder, self.variables | variables)


def make_environment(folder: Path, *, wheel: Path | None = None) -> Environment:
    """Make an environment with the dependencies of this one, without any trueup, or with that of a wheel.

    The dependencies are links to the packages of this environment, so that no registry is needed. Only an environment
    without a wheel has pip, because to install pip takes longer than all else here.
    """
    venv.create(folder, with_pip=wheel is None, symlinks=True)
    dependencies = folder / "dependencies"
    dependencies.mkdir()
    for place in (Path(path) for path in sys.path if path.endswith(("site-packages", "dist-packages"))):
        for entry in place.iterdir():
            link = dependencies / entry.name
            if not entry.name.startswith(CHECKOUT) and entry.name != "__pycache__" and not link.is_symlink():
                link.symlink_to(entry)
    [packages] = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(f"{dependencies}\n")
    if wheel is not None:
        shutil.unpack_archive(wheel, packages, "zip")
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return Environment(folder=folder, variables=clean_environment() | {"PATH": path, "VIRTUAL_ENV": str(folder)})
