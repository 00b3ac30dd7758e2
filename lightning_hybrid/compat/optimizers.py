"""Optimizers of users see whole weights: they may use norms of weights, positions in them, or random numbers.

torch's optimizers compute each element by itself, so that each rank runs them on its parts. Of others nothing is
known. Under `pp`, what mixes weights of several stages is found in the updates 1, 2, 4, 8 and so on, in which the
optimizer also runs on weights of other stages, as tensors without values. Numbers that it reads are sent to all stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_hybrid._lightning_private import plain_optimizer
from lightning_hybrid._torch_private import user_location
from lightning_hybrid.collectives import gather_objects
from lightning_hybrid.compat.divided_weights import DividedWeights
from lightning_hybrid.compat.whole_model import whole_model
from lightning_hybrid.engine.engine import Engine
from lightning_hybrid.engine.hook_view import HookView
from lightning_hybrid.ghosts.ghost import GhostReadError, GhostWriteError
from lightning_hybrid.patching import patched
from lightning_hybrid.spec.errors import PartitionError

_BY_ELEMENT = {
    *(torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adagrad),
    *(torch.optim.Adadelta, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.ASGD, torch.optim.Rprop),
}
"""Optimizers that compute each element by itself."""
_ADAPTED = "lightning_hybrid."


def view_of_updates(engine: Engine, weights: DividedWeights) -> Callable[[Optimizer], HookView | None]:
    """Returns the function by which `OptimizerWrapper` finds the context of an update."""
    layout, updates = engine.plan.layout, dict[int, int]()

    def view_of(optimizer: Optimizer) -> HookView | None:
        optimizer = plain_optimizer(optimizer)
        kind = type(optimizer)
        if layout.devices == layout.dp or kind in _BY_ELEMENT or kind.__module__.startswith(_ADAPTED):
            return None
        updates[id(optimizer)] = count = updates.get(id(optimizer), 0) + 1
        stages = layout.pp > 1 and (weights.drawn_for_others or count & (count - 1) == 0)
        return HookView(partial(_explained, engine, weights, kind.__name__, stages), lambda: not engine.is_running)

    return view_of


@contextmanager
def _explained(engine: Engine, weights: DividedWeights, kind: str, stages: bool) -> Iterator[None]:
    layout = engine.plan.layout
    with ExitStack() as stack:
        stack.enter_context(whole_model(engine, weights, stages=stages))
        if stages:
            reads = _Reads(engine)
            stack.enter_context(patched(engine.partition.parameters.observer, fetch=reads.fetch))
            stack.enter_context(patched(weights, share=reads.share))
        try:
            yield
            if stages:
                reads.end()
        except (GhostReadError, GhostWriteError) as error:
            raise PartitionError(
                f"`configure_optimizers` returned {kind}, whose update computes with weights of several pipeline "
                f"stages together: {str(error).splitlines()[0]} `layout='{layout}'` divides the weights into stages. "
                "Use `gradient_clip_val` to clip by the norm of all gradients, or a layout without `pp`, such "
                f"as '{layout.moved('pp', 'dp')}'."
            ) from error


class _Reads:
    """The numbers that an update reads from tensors; all stages read them at the same places of the user's code.

    Args:
        engine: The running engine.
    """

    def __init__(self, engine: Engine) -> None:
        self._group, self._layout = engine.mesh.group("pp"), engine.plan.layout

    def share(self, value: Any) -> None:
        """Sends a number of this stage to the others."""
        self._exchange(user_location(), [value])

    def fetch(self) -> Any:
        """Returns the number of another stage.

        Raises:
            GhostReadError: If no stage has it, since it depends on weights of several stages.
        """
        place = user_location()
        values = self._exchange(place, [])
        if not values:
            raise GhostReadError(f"{place} reads a number that depends on weights of several stages.")
        return values[0]

    def end(self) -> None:
        """Checks that no other stage reads more."""
        self._exchange("the end of the update", [])

    def _exchange(self, place: str, own: list[Any]) -> list[Any]:
        found = gather_objects((place, own), self._group)
        if len({there for there, _ in found}) > 1:
            places = ", ".join(sorted({there for there, _ in found}))
            raise PartitionError(
                f"`layout='{self._layout}'`: the update of an optimizer reads numbers at different places on different "
                f"pipeline stages: {places}. Use a layout without `pp`, such as '{self._layout.moved('pp', 'dp')}'."
            )
        return [value for _, values in found for value in values]
