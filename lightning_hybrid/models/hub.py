"""Models and tokenizers of the transformers library, from a local folder or by their name on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any


def load_pretrained(load: Callable[..., Any], name: str, argument: str, **options: Any) -> Any:
    """Returns what transformers loads.

    Args:
        load: A `from_pretrained` of transformers.
        name: A local folder, or a name on the hub, which transformers downloads unless it has it.
        argument: The argument that the name was given by, for errors.
        **options: Options of `load`.

    Raises:
        FileNotFoundError: If the name is a path of this machine where nothing is.
        ValueError: If transformers cannot load it.
    """
    folder = Path(name).expanduser()
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not folder.exists():
        raise FileNotFoundError(f"`{argument}`: there is no folder {name}. Current folder: {Path.cwd()}.")
    try:
        return load(str(folder) if folder.exists() else name, **options)
    except (OSError, ValueError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"`{argument}`: transformers cannot load {name!r}: {why}. Give a local folder, or a name on the Hugging "
            "Face hub, such as `organization/name`, which must be downloaded once."
        ) from error
