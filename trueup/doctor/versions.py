"""What this process runs on: Python, and the packages in the versions that trueup asks for."""

import platform
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version

from trueup.doctor.findings import Finding, error, ok, warning
from trueup.extras import EXTRAS, missing_modules
from trueup.settings.settings import Settings

OLDEST_PYTHON = (3, 11)
# Shown as figures: whoever asks for help is asked for these.
SHOWN = ("trueup", "celery", "kombu", "redis", "SQLAlchemy", "psycopg", "alembic", "pydantic")

_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)(?:\[[^\]]*\])?([^;]*)(;.*)?$")
_LIMIT = re.compile(r"(>=|<)\s*([0-9.]+)")


# Packages with which trueup is safe but does less: the first version that is better, and what older ones mean.
WEAKER = {
    "celery": ("5.7", "a metered task whose process is killed is not retried: it fails, and its hold is released"),
}


def check_python() -> Iterator[Finding]:
    running = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        yield error("python", f"This is Python {running}.", "Run trueup on Python 3.11 or newer.", version=running)
    else:
        yield ok("python", f"Python {running}.", version=running)


def check_packages(demands: list[str] | None = None) -> Iterator[Finding]:
    """Yield each package that is missing or of a version not asked for. `demands` None: those of trueup itself."""
    unfit = [_unfit(demand) for demand in (_demands() if demands is None else demands)]
    for told in filter(None, unfit):
        yield error("packages", told, "Install what trueup asks for: `pip install --upgrade trueup`.")
    if not any(unfit):
        there = {name: _installed(name) for name in SHOWN}
        told = ", ".join(f"{name} {number}" for name, number in there.items() if number)
        yield ok("packages", f"{told}.", versions=there)


def check_weaker_versions(installed: Mapping[str, str] | None = None) -> Iterator[Finding]:
    """Yield each package of a version with which trueup is safe but does less. `installed` None: what is there."""
    for name, (better, consequence) in WEAKER.items():
        number = _installed(name) if installed is None else installed.get(name)
        if number is not None and _numbers(number) < _numbers(better):
            yield warning(
                "packages",
                f"With {name} {number} {consequence}.",
                f"Upgrade to {name} {better} or newer; or send such tasks again yourself.",
                package=name,
                version=number,
                better=better,
            )


def check_extras(settings: Settings) -> Iterator[Finding]:
    """Yield each extra that the settings need and that is not installed; what the other missing ones would add."""
    missing = {extra for extra in EXTRAS if missing_modules(extra)}
    needed = [(extra, setting) for extra, setting in _needed_extras(settings) if extra in missing]
    for extra, setting in needed:
        yield error(
            "extras",
            f"{setting} needs the extra [{extra}], which is not installed (no module "
            f"{', '.join(missing_modules(extra))}).",
            f"Install it: pip install 'trueup[{extra}]'; or unset the setting.",
            extra=extra,
        )
    if not needed:
        told = f"Installed: {', '.join(sorted(set(EXTRAS) - missing)) or 'none'}."
        if "features" in missing:
            told += " Without [features] this process registers none of trueup's own AI tasks."
        yield ok("extras", told, installed=sorted(set(EXTRAS) - missing), missing=sorted(missing))


def _needed_extras(settings: Settings) -> Iterator[tuple[str, str]]:
    """Yield the extras that settings ask for, each with its setting."""
    if settings.model_provider == "openai":
        yield "openai", "TRUEUP_MODEL_PROVIDER=openai"
    if settings.beat_scheduler == "redbeat":
        yield "redbeat", "TRUEUP_BEAT_SCHEDULER=redbeat"
    if settings.alerts.apprise_urls:
        yield "apprise", "alerts.apprise_urls"
    if settings.api.has_key:
        yield "api", "A key for the HTTP API"


def _demands() -> list[str]:
    try:
        return requires("trueup") or []
    except PackageNotFoundError:  # run from a checkout that is not installed
        return []


def _unfit(demand: str) -> str | None:
    """Return what is wrong with a package, as asked for in one requirement. Only what always applies is looked at."""
    match = _REQUIREMENT.match(demand)
    if match is None or match[3]:
        return None
    name, limits = match[1], match[2].strip()
    number = _installed(name)
    if number is None:
        return f"{name} is not installed."
    for sign, limit in _LIMIT.findall(limits):
        if (_numbers(number) >= _numbers(limit)) is not (sign == ">="):
            return f"{name} is of version {number}, and trueup asks for {limits}."
    return None


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version; "5.7.0rc1" is (5, 7, 0), trailing zeros left out."""
    numbers = [int(part) for part in re.match(r"[0-9.]*", text)[0].split(".") if part]  # type: ignore[index]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
