"""`python -m tests.mutations`: change the code in one place at a time, and list the changes that no test notices."""

import argparse
import random
import sys
import time
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from sqlalchemy import Engine

from tests.mutations.guard import TESTS, Guard, Memory
from tests.mutations.mutant import ROOT, Mutant
from tests.mutations.python_mutants import PythonFunction, python_functions
from tests.mutations.sql_mutants import SqlFunction, sql_functions

OUTCOMES = ("killed", "invalid", "equivalent", "survived")


def main() -> int:
    """Return 1 if a mutant survived that is not listed as equivalent, else 0."""
    arguments = _arguments()
    equivalents = read_equivalents()
    memory = Memory(arguments.memory)
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def functions(engine: Engine) -> list[SqlFunction | PythonFunction]:
        every = [*sql_functions(engine), *python_functions()]
        if not arguments.only:
            return every
        return [each for name in arguments.only for each in every if each.name == name]

    def choose(mutants: list[Mutant]) -> list[Mutant]:
        if arguments.now:
            mutants = [mutant for mutant in mutants if any(part in mutant.now for part in arguments.now)]
        if arguments.kinds:
            mutants = [mutant for mutant in mutants if mutant.kind in arguments.kinds]
        if arguments.survivors:
            mutants = [mutant for mutant in mutants if mutant.key in memory.survivors]
        if arguments.sample:
            mutants = random.Random(arguments.seed).sample(mutants, min(arguments.sample, len(mutants)))  # noqa: S311
        for mutant in mutants:
            outcomes[mutant.function.name]["equivalent"] += mutant.key in equivalents
        chosen = [mutant for mutant in mutants if mutant.key not in equivalents]
        _say(f"{len(chosen)} mutants")
        return chosen

    def say(mutant: Mutant, outcome: str, killer: str) -> None:
        outcomes[mutant.function.name][outcome] += 1
        if outcome == "survived":
            _say(f"survived: {mutant.function.name} ({mutant.kind})\n    was: {mutant.was}\n    now: {mutant.now}")
        elif arguments.verbose:
            _say(f"{outcome}: {mutant.function.name} {mutant.kind}: {mutant.now} {killer}")

    guard = Guard(memory, functions, choose, arguments.limit, say)
    began = time.monotonic()
    options = ["-q", "--no-header", "--no-summary", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *(arguments.tests or [str(ROOT / name) for name in TESTS])], plugins=[guard])
    _report(outcomes, time.monotonic() - began)
    return 1 if code or guard.has_failed or any(each["survived"] for each in outcomes.values()) else 0


def read_equivalents() -> dict[tuple[str, str, str], str]:
    """Return why each mutant of `equivalents.toml` changes nothing that matters, by its key."""
    entries = tomllib.loads((Path(__file__).parent / "equivalents.toml").read_text()).get("mutant", [])
    return {(each["function"], each["was"], each["now"]): each["why"] for each in entries}


def _report(outcomes: dict[str, Counter[str]], seconds: float) -> None:
    _say(f"\n| function | {' | '.join(OUTCOMES)} |\n| --- |{' ---: |' * len(OUTCOMES)}")
    rows = [*outcomes.items(), ("all", sum(outcomes.values(), Counter()))]
    for name, counts in rows:
        _say(f"| `{name}` | {' | '.join(str(counts[outcome]) for outcome in OUTCOMES)} |")
    _say(f"\n{seconds:.0f} s")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument(
        "--only", nargs="+", help="only these functions, in this order, such as open_hold or trueup.llm.calls:begin"
    )
    parser.add_argument("--now", nargs="+", help="only the mutants whose changed lines have one of these texts")
    parser.add_argument("--kinds", nargs="+", help="only these kinds of changes, such as lock and comparison")
    parser.add_argument("--survivors", action="store_true", help="only the mutants that survived an earlier run")
    parser.add_argument("--sample", type=int, help="so many mutants, drawn at random")
    parser.add_argument("--seed", type=int, default=1, help="what the sample is drawn from")
    parser.add_argument("--limit", type=float, default=60, help="seconds of tests after which a mutant has survived")
    parser.add_argument("--tests", nargs="+", help="run these tests instead of `TESTS` in guard.py")
    parser.add_argument("--memory", type=Path, default=ROOT / ".mutations.json", help="what earlier runs have learned")
    parser.add_argument("--verbose", action="store_true", help="list killed and invalid mutants too")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
