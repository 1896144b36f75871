"""The tests that guard the code. They run in one pytest process, and on each mutant in a fork of it."""

import contextlib
import json
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.pool import NullPool

from tests.conftest import url_of_database
from tests.mutations.mutant import InvalidMutantError, Mutable, Mutant

TESTS = (
    "tests/gate",
    "tests/host/test_schema_changes.py",
    "tests/host/test_sections.py",
    "tests/install/test_search_path.py",
    "tests/usage/test_answers.py",
    "tests/usage/test_charge_events.py",
    "tests/usage/test_charges.py",
    "tests/usage/test_owed_charges.py",
    "tests/usage/test_own_rows.py",
    "tests/usage/test_tracker.py",
    "tests/usage/test_uncountable.py",
    "tests/billing/test_token_hold.py",
    "tests/llm/test_answer_limits.py",
    "tests/llm/test_metering.py",
    "tests/llm/test_model.py",
    "tests/llm/test_openai_outcomes.py",
    "tests/llm/test_output_cap.py",
    "tests/llm/test_traced_calls.py",
)
# The longest time for one test beyond its usual one. A test that hangs kills the mutant.
_PATIENCE_SECONDS = 60
_KILLED = 1


class Memory:
    """What earlier runs have learned, kept in a file.

    `seconds`: how long each test takes. `kills`: how many mutants of each function, and of each changed line of it, a
    test has killed. `survivors`: the keys of the mutants that survived when they were last tried.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        known = json.loads(file.read_text()) if file.exists() else {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.kills = {name: Counter(kills) for name, kills in known.get("kills", {}).items()}
        self.survivors = {tuple(key) for key in known.get("survivors", [])}

    def add(self, mutant: Mutant, killer: str | None) -> None:
        """Note which test has killed the mutant. None: it has survived."""
        if killer:
            for place in _places(mutant):
                self.kills.setdefault(place, Counter())[killer] += 1
            self.survivors.discard(mutant.key)
        else:
            self.survivors.add(mutant.key)
        self.save()

    def order(self, mutant: Mutant, items: Iterable[pytest.Item]) -> list[pytest.Item]:
        """Return the tests, the likeliest killer first: by kills of this line and function, by name and by duration.

        Of the others, one of each file comes before the second one of any file.
        """
        own, line = (self.kills.get(place, Counter()) for place in _places(mutant))
        every = sum(self.kills.values(), Counter())
        words = [word.rstrip("s") for word in re.findall("[a-z]{4,}", mutant.function.name.rpartition(":")[2])]
        of_file: Counter[str] = Counter()

        def place(item: pytest.Item) -> tuple[float, ...]:
            alike = sum(word in item.nodeid for word in words)
            file = item.nodeid.partition("::")[0]
            of_file[file] += 1
            kills = (-count[item.nodeid] for count in (line, own, every))
            return *kills, -alike, of_file[file], self.seconds[item.nodeid]

        return sorted(sorted(items, key=lambda item: self.seconds[item.nodeid]), key=place)

    def save(self) -> None:
        known = {"seconds": self.seconds, "kills": self.kills, "survivors": sorted(self.survivors)}
        self._file.write_text(json.dumps(known))


def _places(mutant: Mutant) -> tuple[str, str]:
    return mutant.function.name, f"{mutant.function.name}: {mutant.was}"


class Guard:
    """A pytest plugin that runs the tests on mutants.

    `functions`: gives the functions, from an engine of the template database. `choose`: gives the mutants to try.
    `limit`: the seconds after which a mutant has survived. `say`: is called with each mutant and its outcome: "killed",
    "invalid" or "survived", and the killer's name. `has_failed`: the tests fail on the code itself.
    """

    def __init__(
        self,
        memory: Memory,
        functions: Callable[[Engine], list[Any]],
        choose: Callable[[list[Mutant]], list[Mutant]],
        limit: float,
        say: Callable[[Mutant, str, str], None],
    ) -> None:
        self._memory = memory
        self._functions = functions
        self._choose = choose
        self._limit = limit
        self._say = say
        self.has_failed = False
        self._fixtures: dict[str, Any] = {}
        self._mutant: Mutant | None = None

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Generator[None, Any, Any]:
        self._fixtures[fixturedef.argname] = result = yield
        if self._mutant and fixturedef.argname == "template_database" and fixturedef.scope != "session":
            # A module's own template, made after the mutant: the setup has installed the function itself there.
            engine = self._engine(result)
            self._mutant.function.install_again(self._mutant, engine)
        return result

    def _engine(self, database: str) -> Engine:
        return create_engine(url_of_database(self._fixtures["stack"].database_url, database), poolclass=NullPool)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            return False
        # The first test always runs: it starts the servers, which all forks then share.
        unknown = [item for item in session.items[1:] if item.nodeid not in self._memory.seconds]
        for item, following in _pairs([session.items[0], *unknown]):
            began = time.monotonic()
            failures = [report for report in runtestprotocol(item, nextitem=following, log=False) if report.failed]
            if failures:
                print(f"{item.nodeid} fails on the code itself:\n{failures[0].longreprtext}", flush=True)  # noqa: T201
                self.has_failed = True
                return True
            self._memory.seconds[item.nodeid] = time.monotonic() - began
        self._memory.save()
        self._try_all(session)
        return True

    def _try_all(self, session: pytest.Session) -> None:
        engine = self._engine(self._fixtures["plain_template"])
        server = self._engine("postgres").execution_options(isolation_level="AUTOCOMMIT")
        mutants = [mutant for function in self._functions(engine) for mutant in function.mutants()]
        for mutant in self._choose(mutants):
            with _in_place(mutant.function, mutant) as is_valid:
                items = self._memory.order(mutant, session.items)
                self._mutant = mutant
                killer = self._killer(items, server) if is_valid else None
            if is_valid:
                self._memory.add(mutant, killer)
            self._say(mutant, "killed" if killer else "survived" if is_valid else "invalid", killer or "")

    def _killer(self, items: list[pytest.Item], server: Engine) -> str | None:
        """Run the tests in a fork until one fails, hangs or ends the process. Returns its name; None: all pass."""
        receiving, sending = os.pipe()
        child = os.fork()
        if not child:
            _run(items, self._memory.seconds, self._limit, sending)
        os.close(sending)
        with os.fdopen(receiving) as pipe:
            started = pipe.read().split("\n")
        status = os.waitpid(child, 0)[1]
        if status:  # it may have left a database of a module, or of a test that was killed
            _drop_databases(server)
        return None if status == 0 else started[-2]


def _run(items: list[pytest.Item], seconds: dict[str, float], limit: float, pipe: int) -> None:
    """Run the tests in this process, which ends with them. Writes the name of each test into the pipe."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    output = os.open(os.devnull, os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    end = time.monotonic() + limit
    for item, following in _pairs(items):
        if time.monotonic() > end:
            break
        os.write(pipe, f"{item.nodeid}\n".encode())
        signal.alarm(_PATIENCE_SECONDS + round(5 * seconds[item.nodeid]))
        if any(report.failed for report in runtestprotocol(item, nextitem=following, log=False)):
            os._exit(_KILLED)
    os._exit(0)


def _pairs(items: list[pytest.Item]) -> Iterable[tuple[pytest.Item, Any]]:
    """Return each test with the next one, which shares its fixtures. After the last, those of the session stay."""
    return zip(items, [*items[1:], items[0].session], strict=True)


@contextlib.contextmanager
def _in_place(function: Mutable, mutant: Mutant) -> Iterator[bool]:
    """Put the mutant in the function's place. Gives False if it is no code."""
    try:
        function.install(mutant)
    except InvalidMutantError:
        yield False
        return
    try:
        yield True
    finally:
        function.restore()


def _drop_databases(server: Engine) -> None:
    with server.connect() as connection:
        for name in connection.scalars(text(r"SELECT datname FROM pg_database WHERE datname LIKE 'test\_%'")).all():
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
