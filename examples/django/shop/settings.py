"""A small shop that sells AI summaries by the token. Everything about trueup is in the last lines."""

import os
from urllib.parse import parse_qsl, unquote, urlsplit

SECRET_KEY = os.environ.get("SECRET_KEY", "only for the example")
ALLOWED_HOSTS = ["127.0.0.1", "localhost"]
ROOT_URLCONF = "shop.urls"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "billing",
    "tasks",
    "api",
    "trueup.django",
]

url = urlsplit(os.environ.get("DATABASE_URL", "postgresql://localhost/shop"))
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": url.path.strip("/"),
        "USER": unquote(url.username or ""),
        "PASSWORD": unquote(url.password or ""),
        "HOST": url.hostname or "",
        "PORT": url.port or "",
        "OPTIONS": dict(parse_qsl(url.query)),
    }
}

CELERY_BROKER_URL = os.environ.get("CELERY_BROKER_URL", "redis://localhost:6379/0")
CELERY_RESULT_BACKEND = CELERY_BROKER_URL

TRUEUP = {
    "TOKEN_PLAN": "billing.TokenPlan",
    "SUBSCRIPTION": "billing.Subscription",
    "USAGE_LOG": "billing.AIUsage",
    # Made-up answers, which cost nothing. In production: "openai", and OPENAI_API_KEY.
    "MODEL_PROVIDER": "offline",
}
