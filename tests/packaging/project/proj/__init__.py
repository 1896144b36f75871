"""A Django project with apps called billing, tasks, api, ai and cli, and a module worker.py."""

from proj.celery import app as celery_app

__all__ = ["celery_app"]
