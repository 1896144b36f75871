"""Write the [host] section of trueup.toml, also into a file whose other sections stay unchanged. Pure."""

import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from trueup.errors import InvalidInputError
from trueup.host.mapping import HostMapping

# A table header named host, bare or quoted, alone or followed by a dot and more. Arrays of tables do not count.
_HEADER = re.compile(r"\s*\[(?!\[)\s*(?P<name>[^\]]*?)\s*\]\s*(#.*)?$")
_HOST = re.compile(r"""(host|"host"|'host')\s*(\.|$)""")


def host_section(settings: Mapping[str, Any], remarks: Sequence[str] = ()) -> str:
    """Return the section as TOML. `remarks`: comments at its head."""
    lines = ["[host]", *(f"# {line}" for remark in remarks for line in remark.splitlines())]
    lines += _pairs({name: value for name, value in settings.items() if not isinstance(value, dict)})
    for noun, names in settings.items():
        if isinstance(names, dict):
            lines += ["", f"[host.{noun}]", *_pairs(names)]
    return "\n".join(lines) + "\n"


def merged(content: str, section: str, *, force: bool) -> str:
    """Return a file's content with the section added. `force`: replace the [host] that it has.

    All else stays unchanged, comments included. Raises `InvalidInputError` if the file is not TOML, if it has a [host]
    and `force` is off, or if its [host] can't be removed by lines.
    """
    try:
        before = tomllib.loads(content)
    except tomllib.TOMLDecodeError as error:
        raise InvalidInputError(
            f"output: the file is not TOML ({error}). Nothing was changed. Correct it, or give another file"
        ) from None
    if "host" in before and not force:
        raise InvalidInputError(
            "output: the file has a [host] already. Nothing was changed. Replace it with --force (everything else "
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
            "output: the [host] of this file is not a section of its own, so trueup can't replace it. Nothing was "
            "changed. Remove it from the file and run the command again"
        )
    return text


def read_host(content: str) -> HostMapping:
    """Return the mapping in a file's [host]. Raises `InvalidInputError` if it is not valid."""
    try:
        return HostMapping.model_validate(tomllib.loads(content).get("host", {}))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise InvalidInputError(f"host: trueup can't read this [host] ({error}). Correct it in the file") from None


def toml_value(value: Any) -> str:
    """Return a value as TOML; a table as an inline table."""
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name} = {toml_value(one)}' for name, one in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON strings are TOML strings, except DEL, which TOML needs escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _pairs(names: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {toml_value(value)}" for name, value in names.items()]


def _without_host(content: str) -> str:
    """Return the content without the tables host and host.*. Comments after a table's last line belong to the next one.

    Therefore `host_section` writes its remarks below the heading.
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
