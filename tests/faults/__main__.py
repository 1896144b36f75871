"""`python -m tests.faults --seed N --rounds N`: play rounds of faults and check the invariants."""

import argparse
import os
import sys
from pathlib import Path

from tests.faults.plans import plan_round
from tests.faults.report import as_markdown
from tests.faults.runs import run_rounds


def main() -> int:
    """Return 1 if an invariant was violated, else 0."""
    arguments = _arguments()
    # The developer's own settings must not reach the rounds.
    for variable in [name for name in os.environ if name.startswith("TRUEUP_")]:
        del os.environ[variable]
    numbers = range(arguments.rounds) if arguments.round is None else [arguments.round]
    totals = run_rounds([plan_round(arguments.seed, number) for number in numbers], _say, arguments.partitions)
    report = as_markdown(totals)
    _say(f"\n{report}")
    if arguments.report:
        arguments.report.write_text(report)
    return 1 if totals.violations else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="what everything is drawn from")
    parser.add_argument("--rounds", type=int, default=10, help="how many rounds to play")
    parser.add_argument("--round", type=int, help="play this one alone, as a failing run says")
    parser.add_argument("--partitions", type=int, help="split trueup's large tables by user into so many")
    parser.add_argument("--report", type=Path, help="write the tables to this file, as markdown")
    return parser.parse_args()


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
