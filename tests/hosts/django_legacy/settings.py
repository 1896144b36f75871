"""A Django project that has sold AI features for years: users, plans and subscriptions as the other one's, and sales.

It gives up on a lock or a statement that takes long, so that nobody could be in its way unnoticed.
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
