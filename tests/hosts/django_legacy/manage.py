"""Django's command line for this project: `python -m tests.hosts.django_legacy.manage use_ai`."""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.hosts.django_legacy.settings")
    execute_from_command_line(sys.argv)
