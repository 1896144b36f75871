"""A real Django project beside trueup: which driver it gets, with and without `keep_psycopg2()`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETTINGS = """
{first}
import os
from urllib.parse import parse_qs, urlsplit

SECRET_KEY = "only for this test"
USE_TZ = True
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth"]
url = urlsplit(os.environ["TRUEUP_DATABASE_URL"])
where = {{name: values[0] for name, values in parse_qs(url.query).items()}}
DATABASES = {{
    "default": {{
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path.strip("/"),
        "USER": url.username,
        "HOST": where["host"],
        "PORT": where["port"],
    }}
}}
"""
KEEP = "from trueup.django import keep_psycopg2\nkeep_psycopg2()"

# What the project then does: its own queries, its own driver's habits, and trueup's connection in the same process.
USE = """
import django
django.setup()
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import DatabaseError, connection
from sqlalchemy import text
from trueup.database.engine import connect

call_command("migrate", verbosity=0)
User.objects.create(username="ada")
print("driver", connection.Database.__name__)
with connect() as trueup:
    print("trueup", trueup.execute(text("SELECT count(*) FROM public.auth_user")).scalar_one(), trueup.dialect.driver)
with connection.cursor() as cursor:
    try:
        cursor.execute("SELECT count(*) FROM auth_user WHERE username IN %s", [("ada", "grace")])
        print("in", cursor.fetchone()[0])
    except DatabaseError:
        print("in refused")
"""


def project(folder: Path, first: str, script: str = USE) -> subprocess.CompletedProcess[str]:
    """Run a script in a Django project whose settings begin with these lines."""
    (folder / "project_settings.py").write_text(SETTINGS.format(first=first))
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=folder,
        env=os.environ | {"DJANGO_SETTINGS_MODULE": "project_settings"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_the_call_django_takes_psycopg_3(empty_database: str, tmp_path: Path) -> None:
    done = project(tmp_path, "")
    assert done.stdout.splitlines() == ["driver psycopg", "trueup 1 psycopg", "in refused"], done.stderr


@pytest.mark.parametrize("before", ["", "import psycopg"], ids=["first", "psycopg-imported-before"])
def test_with_the_call_django_keeps_psycopg2_and_trueup_has_psycopg_3(
    empty_database: str, tmp_path: Path, before: str
) -> None:
    done = project(tmp_path, f"{before}\n{KEEP}\n{KEEP}")
    assert done.stdout.splitlines() == ["driver psycopg2", "trueup 1 psycopg", "in 1"], done.stderr


def test_a_call_that_comes_too_late_is_refused(empty_database: str, tmp_path: Path) -> None:
    done = project(tmp_path, f"import django.db.backends.postgresql.base\n{KEEP}")
    assert "Django has already imported its PostgreSQL backend, with psycopg 3" in done.stderr
    assert done.stdout == ""


def test_without_psycopg2_the_call_says_what_to_install(empty_database: str, tmp_path: Path) -> None:
    done = project(tmp_path, f"import sys\nsys.modules['psycopg2'] = None\n{KEEP}")
    assert "Install it (pip install psycopg2-binary)" in done.stderr
    assert done.stdout == ""


def test_importing_it_imports_neither_django_nor_sqlalchemy() -> None:
    script = "import sys, trueup.django; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "trueup" in loaded
    assert not {"django", "sqlalchemy", "celery", "pydantic", "psycopg", "psycopg2"} & set(loaded)


@pytest.mark.parametrize(("first", "warned"), [("", "trueup.W001"), (KEEP, "")], ids=["silent", "kept"])
def test_manage_py_check_warns_of_a_driver_that_changed_silently(
    empty_database: str, tmp_path: Path, first: str, warned: str
) -> None:
    script = """
import django
django.setup()
from trueup.django.checks import check_driver
print(*(warning.id for warning in check_driver()))
"""
    done = project(tmp_path, first, script)
    assert done.stdout.strip() == warned, done.stderr
