"""The folder of the embedded servers, if `TRUEUP_HOME` is not set."""

import os
from pathlib import Path

import pytest

from trueup.settings.home import default_home


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder inside a project's folder, and the current one."""
    inside = tmp_path / "project" / "shop" / "views"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "project"


def test_outside_of_a_project_it_is_in_the_users_data_folder(project: Path, tmp_path: Path) -> None:
    assert default_home() == tmp_path / "data" / "trueup"


@pytest.mark.parametrize("mark", ["manage.py", "pyproject.toml", "trueup.toml"])
def test_each_folder_of_a_project_has_the_projects_home(project: Path, mark: str) -> None:
    (project / mark).touch()
    assert default_home() == project / ".trueup"
    assert not (project / ".trueup").exists()


def test_a_home_further_up_is_used_again(project: Path) -> None:
    (project / "shop" / "pyproject.toml").touch()
    (project / ".trueup").mkdir()
    assert default_home() == project / ".trueup"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_home_of_another_user_is_not_used(project: Path, tmp_path: Path) -> None:
    (project / ".trueup").mkdir()
    os.chown(project / ".trueup", 65534, 65534)
    assert default_home() == tmp_path / "data" / "trueup"
