"""The Django app `trueup.django`: it gives trueup the settings of the project, and the project trueup's checks."""

from typing import Any

from django.apps import AppConfig

from trueup.settings.settings import use_project_settings


class TrueupApp(AppConfig):
    """`INSTALLED_APPS += ["trueup.django"]` and `TRUEUP = {…}` in the project's settings."""

    name = "trueup.django"
    label = "trueup"
    verbose_name = "trueup"

    def ready(self) -> None:
        from trueup.django import checks as checks  # its import registers the checks

        use_project_settings(_read)


def _read() -> dict[str, Any]:
    """Read the project's settings. Called at their first use: a wrong one must not stop `manage.py migrate`."""
    from trueup.django.configuration import read_configuration

    return read_configuration().settings()
