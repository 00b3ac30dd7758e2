"""LightningCLI, and options of its parser, jsonargparse."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from typing import Any

from jsonargparse import Namespace, _typehints
from jsonargparse._util import NestedArg
from lightning.pytorch.cli import LightningCLI
from typing_extensions import override

from lightning_hybrid.patching import patched


class CommandLine(LightningCLI):
    """LightningCLI that leaves errors of a checkpoint to the strategy, which reads it, too.

    LightningCLI looks for hyperparameters in the file of `--ckpt_path` first, and never runs pickles there.
    """

    @override
    def _parse_ckpt_path(self) -> None:
        with suppress(pickle.UnpicklingError, OSError, RuntimeError, EOFError, ValueError, AttributeError):
            super()._parse_ckpt_path()


@contextmanager
def nested_values_kept() -> Iterator[None]:
    """Keeps the values of options such as `--data.samples.tokenizer=null`, of a field of an argument of a class.

    jsonargparse 4.53 parses such a value, and hands `str` of the result to the parser of the field: `null` becomes the
    text `None`, also within lists and dictionaries.
    """
    adapt = _typehints.adapt_class_type

    @wraps(adapt)
    def adapted(value: Any, *args: Any, **kwargs: Any) -> Any:
        nested = value.get("init_args") if isinstance(value, Namespace) else None
        if isinstance(nested, NestedArg) and not isinstance(nested.val, str):
            value = Namespace(value)
            value["init_args"] = nested._replace(val=json.dumps(nested.val, default=str))
        return adapt(value, *args, **kwargs)

    with patched(_typehints, adapt_class_type=adapted):
        yield
