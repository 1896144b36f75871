"""A Django project, its folder on the path as `manage.py` has it: `accounts` and `billing` are its own."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
