import os
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

import worker

BASE_DIR = Path(__file__).parents[1]
_database = conninfo_to_dict(os.environ["HOST_DATABASE_URL"])

SECRET_KEY = "only-for-tests"
ALLOWED_HOSTS = ["testserver"]
ROOT_URLCONF = "proj.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
AUTH_USER_MODEL = "accounts.User"
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "rest_framework",
    "accounts",
    "billing",
    # Each once `manage.py startapp` has made it.
    *(name for name in ("tasks", "api", "ai", "cli") if (BASE_DIR / name).is_dir()),
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": _database["dbname"],
        "USER": _database.get("user", ""),
        "PASSWORD": _database.get("password", ""),
        "HOST": _database.get("host", ""),
        "PORT": str(_database.get("port", "")),
    }
}
REST_FRAMEWORK = {"DEFAULT_AUTHENTICATION_CLASSES": ["rest_framework.authentication.BasicAuthentication"]}

CELERY_BROKER_URL = CELERY_RESULT_BACKEND = os.environ["HOST_BROKER_URL"]
CELERY_INCLUDE = ["trueup.tasks.upkeep"]
CELERY_TASK_QUEUES = {name: {} for name in worker.QUEUES}
CELERY_TASK_ACKS_LATE = True
