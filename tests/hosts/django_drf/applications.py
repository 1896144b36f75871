"""The project as a WSGI and as an ASGI application."""

import os

from django.core.asgi import get_asgi_application
from django.core.wsgi import get_wsgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.hosts.django_drf.settings")
wsgi = get_wsgi_application()
asgi = get_asgi_application()
