"""Observes the calls of units on this replica's own first batch, which differ from those on other replicas' batches."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import wraps
from typing import Any

from lightning_hybrid.ghosts.parameters import Parameters
from lightning_hybrid.ghosts.record import Trace
from lightning_hybrid.replicas.calls import StepCalls
from lightning_hybrid.rng.state import RNGState, seed_all
from lightning_hybrid.spec.errors import PartitionError

_RANDOM_RUNS = 8
"""Dry runs of a step that draws random numbers: of 4 layers that are each dropped with probability 0.1 on one of two
replicas, all would be called in every run with probability 0.001."""

DryRun = Callable[[Callable[[Callable[..., Any]], Callable[..., Any]]], Trace]
"""Runs the step once on ghosts. Its argument returns a replacement of the step function."""


def observe_calls(run: DryRun, parameters: Parameters, units: Collection[str]) -> StepCalls:
    """Returns the calls of units in a dry run, or in several if the step draws random numbers.

    A dry run that fails is no reason to refuse a layout that does not need it.

    Args:
        run: Runs the step once on ghosts, with the use of weights recorded.
        parameters: The parameters of the module.
        units: Names of the units.
    """
    runs: list[tuple[str, ...]] = []
    read_outside: set[str] = set()
    written: dict[str, str] = {}
    draws = [True]
    try:
        while len(runs) < (_RANDOM_RUNS if draws[-1] else 1):
            trace = run(lambda step: _seeded(step, len(runs), draws))
            runs.append(tuple(call.name for call in trace.calls))
            if trace.use is not None:
                use = trace.use
                written |= use.written
                read_outside |= {u for u in units if any(use.users(p, u) for p in parameters.inside(u))}
            trace.release()
    except PartitionError as error:
        return StepCalls(problem=str(error))
    except Exception as error:  # noqa: BLE001 -- user code on ghosts may raise anything
        return StepCalls(problem=f"{type(error).__name__}: {error}")
    written = {parameters.first_names[name]: line for name, line in written.items()}
    return StepCalls(runs=tuple(runs), read_outside=frozenset(read_outside), written=written)


def _seeded(step: Callable[..., Any], seed: int, draws: list[bool]) -> Callable[..., Any]:
    """Returns `step` with random numbers of `seed`; appends to `draws` True if the step has drawn any."""

    @wraps(step)
    def run(*args: Any) -> Any:
        seed_all(seed)
        before = RNGState.capture()
        out = step(*args)
        draws.append(not before.equals(RNGState.capture()))
        return out

    return run
