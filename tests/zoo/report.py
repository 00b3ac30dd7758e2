"""Runs the zoo and writes the table of what is exact, refused or broken.

python -m tests.zoo.report                                        # everything
python -m tests.zoo.report --cases llama gpt2 --layouts pp2 tp2   # pp2 stands for all schedules
python -m tests.zoo.report --cases llama --layouts pp2/GPipe -v   # one run, with the whole error
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from tests.harness import RankGroup
from tests.zoo.case import Case
from tests.zoo.cases import CASES, GROUPS
from tests.zoo.expected import expected_refusal
from tests.zoo.run import Combination, Outcome, References, evaluate

LAYOUTS = ("dp2", "fsdp2", "tp2", "pp2", "dp2-pp2", "tp2-pp2", "fsdp2-tp2")


def main() -> int:
    """Entry point; returns 1 if anything is broken or was refused without being expected to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=["all"], help=f"names, or {', '.join(GROUPS)}")
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--validate", action="store_true", help="validate as well, before and after the training")
    parser.add_argument("--write", type=Path, help="file for the table in Markdown")
    parser.add_argument("-v", "--verbose", action="store_true", help="print whole errors")
    options = parser.parse_args()
    cases = [CASES[name] for entry in options.cases for name in GROUPS.get(entry, [entry])]
    combinations = [each for text in options.layouts for each in Combination.parse(text)]
    outcomes = _run(cases, combinations, validate=options.validate, verbose=options.verbose)
    table = markdown(cases, combinations, outcomes)
    sys.stdout.write("\n" + table)
    if options.write:
        options.write.write_text(table)
    return int(any(is_broken(name, combination, outcome) for (name, combination), outcome in outcomes.items()))


def is_broken(name: str, combination: Combination, outcome: Outcome) -> bool:
    """Whether the outcome is neither exact nor the refusal that the table expects."""
    pattern = expected_refusal(name, combination)
    if outcome.status == "refused":
        return pattern is None or re.search(pattern, outcome.detail) is None
    return pattern is not None or outcome.status not in ("exact", "trained")


def _run(
    cases: list[Case], combinations: list[Combination], *, validate: bool, verbose: bool
) -> dict[tuple[str, Combination], Outcome]:
    outcomes = {}
    references = References()
    for devices in sorted({combination.devices for combination in combinations}):
        with RankGroup(devices) as ranks:
            for combination in [each for each in combinations if each.devices == devices]:
                for case in cases:
                    start = time.monotonic()
                    outcome = evaluate(case, combination, ranks, references, validate=validate)
                    outcomes[case.name, combination] = outcome
                    _print_line(case, combination, outcome, time.monotonic() - start, verbose=verbose)
    return outcomes


def _print_line(case: Case, combination: Combination, outcome: Outcome, seconds: float, *, verbose: bool) -> None:
    broken = is_broken(case.name, combination, outcome)
    status = outcome.status.upper() if broken else outcome.status
    detail = outcome.detail if verbose else outcome.detail.split("\n")[0][:200]
    sys.stdout.write(
        f"{case.name:20} {combination!s:22} {status:8} {outcome.update_error:8.1e} {seconds:5.1f}s  {detail}\n"
    )
    sys.stdout.flush()


def markdown(
    cases: list[Case], combinations: list[Combination], outcomes: dict[tuple[str, Combination], Outcome]
) -> str:
    """The table: largest relative error of the update where exact, else what happened; refusals and failures below."""
    lines = [
        "| model | " + " | ".join(str(combination) for combination in combinations) + " |",
        "|---" * (1 + len(combinations)) + "|",
    ]
    notes: dict[str, str] = {}
    for case in cases:
        cells = [_cell(outcomes[case.name, combination]) for combination in combinations]
        lines.append(f"| {case.name} | " + " | ".join(cells) + " |")
        for combination in combinations:
            outcome = outcomes[case.name, combination]
            if outcome.status not in ("exact", "trained"):
                axis = "pp" if "pp" in combination.axes else combination.layout
                notes.setdefault(
                    f"{case.name}, {axis}", f"{outcome.status}: " + " ".join(outcome.detail.split("\n")[0].split())
                )
    counts = {}
    for outcome in outcomes.values():
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    total = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    return "\n".join(
        [*lines, "", f"{len(outcomes)} runs: {total}.", "", *(f"- {k}: {v}" for k, v in notes.items()), ""]
    )


def _cell(outcome: Outcome) -> str:
    if outcome.status == "exact":
        return f"{outcome.update_error:.0e}"
    return outcome.status if outcome.status in ("trained", "refused") else f"**{outcome.status}**"


if __name__ == "__main__":
    sys.exit(main())
