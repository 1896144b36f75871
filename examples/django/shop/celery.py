"""The project's Celery application: its own tasks, and trueup's upkeep."""

import os

from celery import Celery

import trueup

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "shop.settings")

app = Celery("shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.conf.include = ["tasks.summaries"]
trueup.add_upkeep(app)
