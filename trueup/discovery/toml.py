"""The [host] section of trueup.toml: written as text, put into a file whose other sections stay as they are. Pure."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from trueup.errors import InvalidInputError
from trueup.host.mapping import HostMapping

# "host" bare or quoted, alone or with more behind a dot; an array of tables is none of ours.
_HEADER = re.compile(r"\s*\[(?!\[)\s*(?P<name>[^\]]*?)\s*\]\s*(#.*)?$")
_HOST = re.compile(r"""(host|"host"|'host')\s*(\.|$)""")


def host_section(settings: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """Return the section as TOML. `remarks`: what is missing, as comments at its head."""
    lines = ["[host]", *(f"# {line}" for remark in remarks for line in remark.splitlines())]
    lines += [*_pairs({name: value for name, value in settings.items() if not isinstance(value, dict)})]
    for noun, names in settings.items():
        if isinstance(names, dict):
            lines += ["", f"[host.{noun}]", *_pairs(names)]
    return "\n".join(lines) + "\n"


def merged(content: str, section: str, *, force: bool) -> str:
    """Return a file's content with the section in it. `force`: in place of the [host] that it has.

    Everything else stays as it is, comments too. Raises `InvalidInputError` where that can't be done safely: the file
    is no TOML, it has a [host] and `force` is off, or its [host] is written so that it can't be taken out by lines.
    """
    try:
        before = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(f"output: the file is no TOML ({error}). Correct it, or give another file") from None
    if "host" in before and not force:
        raise InvalidInputError(
            "output: the file has a [host] already, and nothing was changed. Replace it with --force (everything else "
            "stays), or give another file with --output"
        )
    rest = _without_host(content) if "host" in before else content
    text = f"{rest.rstrip()}\n\n{section}" if rest.strip() else section
    try:
        after = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        after = {}
    wanted = tomllib.loads(section)
    if after != {**before, "host": wanted["host"]}:
        raise InvalidInputError(
            "output: the [host] of this file is not written as a section of its own, and nothing was changed. Take it "
            "out by hand, then write again"
        )
    return text


def read_host(content: str) -> HostMapping:
    """Return the mapping that a file's [host] says. Raises `InvalidInputError`."""
    try:
        return HostMapping.model_validate(tomllib.loads(content).get("host", {}))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise InvalidInputError(f"host: what was written can't be read back ({error})") from None


def toml_value(value: Any) -> str:
    """Return a value as TOML, a table in one line."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {toml_value(one)}' for name, one in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's strings are TOML's, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _pairs(names: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {toml_value(value)}" for name, value in names.items()]


def _without_host(content: str) -> str:
    """Leave out each table called host, or host.something, up to its last line; comments after that are the next one's.

    So trueup's own remarks stand below their heading.
    """
    kept, inside = [], False
    after: list[str] = []
    for line in content.splitlines(keepends=True):
        header = _HEADER.match(line)
        if header or line.lstrip().startswith("[["):
            was_inside, inside = inside, bool(header and _HOST.match(header["name"]))
            if was_inside and not inside:
                kept += after
            after = []
        elif inside:
            after = [*after, line] if not line.strip() or line.lstrip().startswith("#") else []
        if not inside:
            kept.append(line)
    return "".join([*kept, *after])
