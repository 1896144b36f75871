"""A Django project. Its folder is on the path, as `manage.py` puts it: `accounts` and `billing` are its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
