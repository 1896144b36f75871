"""What trueup's pages share: their look, their chart, and a policy that allows only their own style and script."""

import base64
import hashlib
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined

from trueup.drift.causes import cause_sentence, cause_title
from trueup.reports.display import compact, count_of, percent, show, signed

STYLE = "page.css"


def read_part(package: str, name: str) -> str:
    """Return a file of a package: a template, a style or a script."""
    return files(package).joinpath(name).read_text(encoding="utf-8")


def environment(package: str) -> Environment:
    """Return the environment of a package's templates, which escapes everything.

    A template can include another one of its package or of this one, and knows the functions that show figures.
    """

    def load(name: str) -> str | None:
        for place in (package, __package__):
            if files(place).joinpath(name).is_file():
                return read_part(place, name)
        return None

    made = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=FunctionLoader(load),
    )
    made.globals.update(
        show=show,
        compact=compact,
        signed=signed,
        percent=percent,
        count_of=count_of,
        cause_title=cause_title,
        cause_sentence=cause_sentence,
    )
    return made


def integrity(content: str) -> str:
    """Return the hash of a style or script for the page's policy, as it stands on a line of its own after its tag."""
    digest = hashlib.sha256(f"\n{content}".encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
