"""Validation by the JSON schemas of docs/ in this process, because a separate tool takes seconds for each document."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, FormatChecker

_DOCS = Path(__file__).parents[2] / "docs"
_FORMATS = FormatChecker(formats=())


@_FORMATS.checks("date-time", raises=ValueError)
def _is_moment(value: object) -> bool:
    return not isinstance(value, str) or datetime.fromisoformat(value).tzinfo is not None


def complaints(document: Any, schema: str) -> list[str]:
    """Return the violations of a schema of docs/, given by its file name, in a document. None if it is valid."""
    content = json.loads((_DOCS / schema).read_text())
    Draft202012Validator.check_schema(content)
    return [error.message for error in Draft202012Validator(content, format_checker=_FORMATS).iter_errors(document)]
