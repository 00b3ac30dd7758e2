"""Layouts: the sizes of the device mesh's axes, and their text form."""

import difflib
import math
import re
from dataclasses import dataclass, fields, replace

_AXIS_PATTERN = re.compile(r"([a-z]+)([0-9]+)")
_ALTERNATIVES_SHOWN = 8
"""How many valid layouts an error lists: enough to choose from, few enough to read."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The number of devices on each axis of the device mesh.

    The text form names every axis larger than one, as in ``"dp2-fsdp2-tp2-pp2"``; ``Layout()`` is ``"dp1"``.

    Raises:
        ValueError: If a size is not a whole number of at least 1.
    """

    dp: int = 1
    """Replicas: each holds the whole model and reads its own shard of the batch."""
    fsdp: int = 1
    """Sharded replicas: each reads its own shard of the batch and holds a shard of every weight."""
    ep: int = 1
    """Expert-parallel ranks: replicas over which the experts of a mixture are divided; they hold all other weights."""
    tp: int = 1
    """Tensor-parallel ranks: they share one batch and split the weights of each block."""
    pp: int = 1
    """Pipeline ranks: each holds one or more stages of the model."""

    def __post_init__(self) -> None:
        for axis in self.axes():
            size = getattr(self, axis)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(
                    f"`{axis}` must be a whole number of at least 1. Got {size!r}. "
                    f"Leave `{axis}` out, or set it to 1, for a layout that does not use this axis."
                )

    @classmethod
    def axes(cls) -> tuple[str, ...]:
        """Returns the names of the axes, in the order in which the text form writes them."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Reads a layout from its text form.

        Args:
            text: Axes with their sizes, joined by ``-``, in any order, such as ``"dp2-pp2"``. An axis left out has
                size 1.

        Returns:
            The layout; ``Layout.parse(str(layout)) == layout``.

        Raises:
            ValueError: If the text is not of that form, names an unknown axis, or names an axis twice or with size 0.
        """
        if not isinstance(text, str):
            raise ValueError(f"`layout` must be text such as 'dp2-tp2-pp2'. Got {text!r}.")
        sizes: dict[str, int] = {}
        for part in text.split("-"):
            match = _AXIS_PATTERN.fullmatch(part)
            if match is None:
                raise ValueError(
                    f"`layout` must be axes with sizes joined by '-', such as 'dp2-tp2-pp2'. "
                    f"Got {text!r}, where {part!r} is not an axis with a size."
                )
            axis, size = match[1], int(match[2])
            if axis not in cls.axes():
                raise ValueError(
                    f"`layout` has the axes {', '.join(cls.axes())}. Got {text!r} with the unknown axis {axis!r}."
                    f"{_did_you_mean(text, part, cls.axes())}"
                )
            if axis in sizes:
                raise ValueError(
                    f"`layout` must name each axis at most once. Got {text!r}, which names {axis!r} twice. "
                    f"Write one size for {axis!r}."
                )
            if size == 0:
                raise ValueError(
                    f"`layout` must give each axis a size of at least 1. Got {text!r}, where {axis!r} is 0. "
                    f"Leave out an axis that is not used."
                )
            sizes[axis] = size
        return cls(**sizes)

    @property
    def devices(self) -> int:
        """The number of devices: the product of the axis sizes."""
        return math.prod(self.sizes())

    @property
    def replicas(self) -> int:
        """The number of data-parallel replicas of any kind: the parts into which the global batch is split."""
        return self.dp * self.fsdp * self.ep

    @property
    def shards(self) -> int:
        """The number of shards of the weights outside the experts: with `fsdp` they are sharded over `ep`, too."""
        return self.fsdp * self.ep if self.fsdp > 1 else 1

    def validate(self, devices: int) -> None:
        """Checks that the layout uses exactly the given number of devices.

        Args:
            devices: The number of devices of the Trainer, over all nodes.

        Raises:
            ValueError: If the product of the axis sizes differs. The message lists valid layouts, nearest first.
        """
        if self.devices == devices:
            return
        factors = [str(size) for size in self.sizes() if size > 1]
        needs = f"{' × '.join(factors)} = {self.devices}" if len(factors) > 1 else str(self.devices)
        raise ValueError(
            f"`layout` must use every device once. Got '{self}', which needs {needs}, with {devices} "
            f"device{'' if devices == 1 else 's'}. "
            f"Set the Trainer's `devices` and `num_nodes` to {self.devices} in all{self._advice(devices)}."
        )

    def alternatives(self, devices: int) -> list["Layout"]:
        """Returns every layout for the given number of devices, nearest to this one first.

        Layouts that keep ``ep``, ``tp`` and ``pp`` come first: a rank's shard of the model is unchanged, and only
        the number of replicas changes. Then come those that change fewer axes, and those that change them less.

        Args:
            devices: The number of devices to lay out.

        Returns:
            The layouts, in the same order on every rank.
        """
        layouts = [
            Layout(dp=dp, fsdp=fsdp, ep=ep, tp=tp, pp=devices // (dp * fsdp * ep * tp))
            for dp in _divisors(devices)
            for fsdp in _divisors(devices // dp)
            for ep in (_divisors(devices // (dp * fsdp)) if self.ep > 1 else [1])  # not every model has experts
            for tp in _divisors(devices // (dp * fsdp * ep))
        ]
        return sorted(layouts, key=self._distance)

    def moved(self, axis: str, to: str) -> "Layout":
        """Returns the layout for as many devices that has the ranks of `axis` on the axis `to` instead."""
        return replace(self, **{axis: 1, to: getattr(self, to) * getattr(self, axis)})

    def __str__(self) -> str:
        """Returns the text form, such as ``"dp2-pp2"``."""
        parts = [f"{axis}{size}" for axis, size in zip(self.axes(), self.sizes(), strict=True) if size > 1]
        return "-".join(parts) or "dp1"

    def sizes(self) -> tuple[int, ...]:
        """Returns the sizes of the axes, in the order of `axes`."""
        return self.dp, self.fsdp, self.ep, self.tp, self.pp

    def _distance(self, other: "Layout") -> tuple[float, ...]:
        pairs = list(zip(self.sizes(), other.sizes(), strict=True))
        changed = [mine != theirs for mine, theirs in pairs]
        doublings = sum(abs(math.log2(theirs / mine)) for mine, theirs in pairs)
        return changed[2] + changed[3] + changed[4], sum(changed), doublings, *(-size for size in other.sizes())

    def _advice(self, devices: int) -> str:
        if devices < 1:
            return ""
        layouts = self.alternatives(devices)
        shown = ", ".join(f"'{layout}'" for layout in layouts[:_ALTERNATIVES_SHOWN])
        rest = len(layouts) - _ALTERNATIVES_SHOWN
        more = f" ({rest} more)" if rest > 0 else ""
        return f", or choose a layout for {devices}: {shown}{more}"


def _did_you_mean(text: str, part: str, axes: tuple[str, ...]) -> str:
    axis = part.rstrip("0123456789")
    near = difflib.get_close_matches(axis, axes, n=1, cutoff=0.5)
    return f" Did you mean {text.replace(part, part.replace(axis, near[0]))!r}?" if near else ""


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
