"""A Django project that has sold AI features for years: users, plans and subscriptions like the other, and sales.

Its statements have short time limits for locks and in total, so that it notices everything that makes it wait.
"""

from tests.hosts.django_drf import settings as other

SECRET_KEY = other.SECRET_KEY
USE_TZ = True
DEFAULT_AUTO_FIELD = other.DEFAULT_AUTO_FIELD
AUTH_USER_MODEL = other.AUTH_USER_MODEL

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "accounts",
    "billing",
    "tests.hosts.django_legacy.sales",
]
DATABASES = {
    "default": {
        **other.DATABASES["default"],
        "OPTIONS": {"application_name": "shop", "options": "-c lock_timeout=3s -c statement_timeout=10s"},
    }
}
