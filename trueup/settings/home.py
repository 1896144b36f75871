"""The folder of the embedded PostgreSQL and Redis, if `TRUEUP_HOME` is not set."""

import os
from pathlib import Path

FOLDER = ".trueup"
# Files and folders that only a project's own folder has.
_MARKS = ("trueup.toml", "manage.py", "pyproject.toml", ".git")


def default_home() -> Path:
    """Return the project's `.trueup`, else the user's data folder. Nothing is created.

    An existing `.trueup` in the current folder or in one above it counts first; else the nearest folder that looks like
    a project gets one. A folder of another user does not count: its files would name the database that we connect to.
    """
    here = Path.cwd()
    above = [folder for folder in (here, *here.parents) if _is_own(folder)]
    for folder in above:
        if (folder / FOLDER).is_dir() and _is_own(folder / FOLDER):
            return folder / FOLDER
    for folder in above:
        if any((folder / mark).exists() for mark in _MARKS):
            return folder / FOLDER
    from platformdirs import user_data_path

    return user_data_path("trueup", appauthor=False)


def _is_own(folder: Path) -> bool:
    try:
        return folder.stat().st_uid == os.geteuid()
    except OSError:
        return False
