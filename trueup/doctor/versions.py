"""The versions of Python and of the packages that trueup requires."""

import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.extras import EXTRAS, PROVIDER_EXTRAS, missing_modules
from trueup.settings.settings import Settings

OLDEST_PYTHON = (3, 11)
# A support request needs these versions.
SHOWN = ("trueup", "celery", "kombu", "redis", "SQLAlchemy", "psycopg", "alembic", "pydantic")

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?([^;]*)(;.*)?$")
_LIMIT = re.compile(r"(>=|<)\s*([0-9.]+)")

# trueup works safely with older versions of these packages, but does less: the better version, and the consequence.
WEAKER = {"celery": ("5.7", "a metered task whose process is killed is not retried; it fails, its hold is released")}


def check_python() -> Iterator[Finding]:
    running = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        yield error("python", f"This is Python {running}.", "Run trueup on Python 3.11 or newer.", version=running)
    else:
        yield ok("python", f"Python {running}.", version=running)


def check_packages(demands: list[str] | None = None) -> Iterator[Finding]:
    """Yield each missing package and wrong version. `demands`: requirements; None: trueup's own."""
    unfit = [_unfit(demand) for demand in (_demands() if demands is None else demands)]
    for problem in filter(None, unfit):
        yield error("packages", problem, "Install the required versions: `pip install --upgrade trueup`.")
    if not any(unfit):
        versions = {name: _installed(name) for name in SHOWN}
        shown = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
        yield ok("packages", f"{shown}.", versions=versions)


def check_weaker_versions(installed: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Yield each package of `WEAKER` that is older than the better version. `installed` None: read the versions."""
    for name, (better, consequence) in WEAKER.items():
        number = _installed(name) if installed is None else installed.get(name)
        if number is not None and _numbers(number) < _numbers(better):
            remedy = f"Upgrade to {name} {better} or newer, or send such tasks again yourself."
            detail = {"package": name, "version": number, "better": better}
            yield warning("packages", f"With {name} {number} {consequence}.", remedy, **detail)


def check_extras(settings: Settings) -> Iterator[Finding]:
    """Yield each missing extra that the settings need."""
    missing = {extra for extra in EXTRAS if missing_modules(extra)}
    needed = [
        (extra, setting, lacks)
        for extra, setting, modules in _needed_extras(settings)
        if (lacks := missing_modules(extra, *modules))
    ]
    for extra, setting, lacks in needed:
        yield error(
            "extras",
            f"{setting} needs the extra [{extra}], which is not installed (no module {', '.join(lacks)}).",
            f"Install it: pip install 'trueup[{extra}]', or unset the setting.",
            extra=extra,
        )
    if not needed:
        installed = sorted(set(EXTRAS) - missing)
        what = f"Installed: {', '.join(installed) or 'none'}."
        if "features" in missing:
            what += " Without [features] this process registers none of trueup's own AI tasks."
        yield ok("extras", what, installed=installed, missing=sorted(missing))


def _needed_extras(settings: Settings) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """Yield each extra that a setting needs, the setting, and the modules that it needs; empty: all of the extra."""
    if settings.model_provider is not None:
        extra, modules = PROVIDER_EXTRAS[settings.model_provider]
        yield extra, f"TRUEUP_MODEL_PROVIDER={settings.model_provider}", modules
    if settings.beat_scheduler == "redbeat":
        yield "redbeat", "TRUEUP_BEAT_SCHEDULER=redbeat", ()
    if settings.alerts.apprise_urls:
        yield "apprise", "alerts.apprise_urls", ()
    for pattern, model in settings.models.items():
        if model.tokenizer_file is not None:
            yield "tokenizers", f'tokenizer = "{model.tokenizer}" of model "{pattern}"', ()
    if settings.api.has_key:
        yield "api", "A key for the HTTP API", ()


def _demands() -> list[str]:
    try:
        return requires("trueup") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []


def _unfit(demand: str) -> str | None:
    """Return the problem with a requirement, or None. Requirements with a marker are not checked."""
    match = _REQUIREMENT.match(demand)
    if match is None or match[3]:
        return None
    name, limits = match[1], match[2].strip()
    number = _installed(name)
    if number is None:
        return f"{name} is not installed."
    for sign, limit in _LIMIT.findall(limits):
        if (_numbers(number) >= _numbers(limit)) is not (sign == ">="):
            return f"{name} has version {number}, but trueup requires {limits}."
    return None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version without trailing zeros: (5, 7) for "5.7.0rc1"."""
    numbers = [int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
