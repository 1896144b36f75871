"""`manage.py trueup …`: trueup's commands with the project's settings."""

import sys
from typing import Any, ClassVar

from django.core.management.base import BaseCommand, CommandError, CommandParser

from trueup.cli import main


class Command(BaseCommand):
    help = "trueup's commands with this project's settings: manage.py trueup drift report --read-only"
    # The commands report wrong settings themselves, and `db attach` is the remedy for some checks.
    requires_system_checks: ClassVar[list[str]] = []

    def run_from_argv(self, argv: list[str]) -> None:
        """Pass all words to trueup, whose exit codes hold. Django has read its own options before."""
        words = list(argv[2:])
        for option in ("--settings", "--pythonpath"):
            while option in words[:-1]:
                place = words.index(option)
                del words[place : place + 2]
            words = [word for word in words if not word.startswith(f"{option}=")]
        sys.exit(main.main(words, prog_name="manage.py trueup", standalone_mode=True))

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("words", nargs="*", help="a command of trueup and its arguments")

    def handle(self, *_: Any, words: list[str], **__: Any) -> None:
        """Run a command for `call_command("trueup", "db", "attach", "--yes")`."""
        code = main.main(words, prog_name="manage.py trueup", standalone_mode=False)
        if code:
            raise CommandError(f"trueup {' '.join(words)} ended with exit code {code}.", returncode=code)
