"""Private attributes of `DataLoader`."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _BaseDataLoaderIter

LoaderIterator = _BaseDataLoaderIter


def replace_parts(loader: DataLoader, **parts: Any) -> None:
    """Sets attributes of a new copy of a loader, such as `batch_sampler`, and drops its persistent workers.

    A `DataLoader` refuses to have these attributes set, since its sampler depends on them; this sets all of them.
    """
    loader.__dict__.update(parts, _iterator=None)
