"""The package: the content of the wheel, which is the same for every kind of source."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.packaging.wheels import ROOT, build, contents, unpack

LINKS = ("cli", "tasks", "worker")
SOURCES = ("trueup", *LINKS, "examples")
BESIDE = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", ".gitignore")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return contents(build("wheel", ROOT, tmp_path_factory.mktemp("wheel")))


def test_the_wheel_has_one_top_level_name(wheel: dict[str, bytes]) -> None:
    places = {name.partition("/")[0] for name in wheel}
    assert {place for place in places if not place.endswith(".dist-info")} == {"trueup"}
    assert "trueup/py.typed" in wheel


def test_the_wheel_has_every_file_of_the_packages(wheel: dict[str, bytes]) -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *SOURCES]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.splitlines()
    if not listed:
        pytest.skip("this is no checkout, but a copy without its history")
    places = {"examples": "trueup/cli/demo/examples", "trueup": "trueup"} | {name: f"trueup/{name}" for name in LINKS}
    expected = set()
    for name in listed:
        top, _, rest = name.partition("/")
        if (ROOT / name).is_file() and not (top == "examples" and "/" in rest):
            expected.add(f"{places[top]}/{rest}")
    assert {name for name in wheel if name.startswith("trueup/")} == expected


def test_the_sdist_builds_the_same_wheel(wheel: dict[str, bytes], tmp_path: Path) -> None:
    source = unpack(build("sdist", ROOT, tmp_path / "sdist"), tmp_path / "source")
    assert not [path for path in source.rglob("*") if path.is_symlink()]
    assert contents(build("wheel", source, tmp_path / "wheel")) == wheel


@pytest.mark.parametrize("kept", ["nothing", "a text file"])
def test_an_archive_without_links_builds_the_same_wheel(wheel: dict[str, bytes], kept: str, tmp_path: Path) -> None:
    """On systems without links, an unpacked archive has none, or a file with the link's target as its text."""
    source = tmp_path / "source"
    for name in SOURCES:
        hidden = shutil.ignore_patterns("__pycache__", *(LINKS if name == "trueup" else ()))
        shutil.copytree(ROOT / name, source / name, ignore=hidden)
    for name in BESIDE:
        shutil.copy(ROOT / name, source / name)
    if kept == "a text file":
        for name in LINKS:
            (source / "trueup" / name).write_text(f"../{name}")
    assert contents(build("wheel", source, tmp_path / "wheel")) == wheel
