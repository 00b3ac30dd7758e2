"""`SaveConfig`: saves the configuration of a run without its secrets."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

_SECRET = re.compile(r"(api_?key|access_?token|auth_?token|password|passwd|secret)$", re.IGNORECASE)


class SaveConfig(SaveConfigCallback):
    """Saves the configuration as LightningCLI does, with every key, token and password replaced by null.

    A run reads secrets from its environment; the saved file may be copied, committed and uploaded.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, *args: Any, **kwargs: Any) -> None:
        super().__init__(parser, redacted(config.clone()), *args, **kwargs)


def redacted(config: Any) -> Any:
    """Replaces secrets in `config`, a tree of namespaces, dictionaries and lists, by None, in place, and returns it."""
    if isinstance(config, Namespace | dict):
        items = vars(config) if isinstance(config, Namespace) else config
        for key, value in items.items():
            items[key] = None if isinstance(key, str) and _SECRET.search(key) else redacted(value)
    elif isinstance(config, list):
        config[:] = [redacted(x) for x in config]
    return config
