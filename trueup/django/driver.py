"""Which PostgreSQL driver a Django project uses, once trueup has brought psycopg 3 into its environment."""

import importlib
import importlib.util
import sys

from trueup.errors import SettingsError

_BACKEND = "django.db.backends.postgresql"


def keep_psycopg2() -> None:
    """Have Django use psycopg2, although psycopg 3 is installed. Call it at the top of the project's settings.

    Django has no setting for this: its PostgreSQL backend takes psycopg 3 as soon as it can be imported. This imports
    the backend while psycopg 3 can't be imported; afterwards it can, so that trueup's own connections work as before.
    Calling it again does nothing.

    Raises `SettingsError` when psycopg2 is not installed, or when Django has imported its backend with psycopg 3.
    """
    if f"{_BACKEND}.psycopg_any" not in sys.modules:
        if importlib.util.find_spec("psycopg2") is None:
            raise SettingsError(
                "keep_psycopg2(): psycopg2 is not installed, so Django can't use it. Nothing was changed. Install it "
                "(pip install psycopg2-binary), or remove the call to let Django use psycopg 3."
            )
        _import_without_psycopg(f"{_BACKEND}.base")
    if getattr(sys.modules[f"{_BACKEND}.psycopg_any"], "is_psycopg3", False):
        raise SettingsError(
            "keep_psycopg2(): Django has already imported its PostgreSQL backend, with psycopg 3, and would go on "
            "with it. Call keep_psycopg2() at the top of the settings module, before anything else imports Django."
        )


def _import_without_psycopg(module: str) -> None:
    """Import a module that finds no psycopg 3. Another thread that imports psycopg meanwhile would find none either."""
    present = "psycopg" in sys.modules
    psycopg = sys.modules.get("psycopg")
    sys.modules["psycopg"] = None  # type: ignore[assignment] # the import system reads None as: there is none
    try:
        importlib.import_module(module)
    finally:
        if present and psycopg is not None:
            sys.modules["psycopg"] = psycopg
        else:
            del sys.modules["psycopg"]
