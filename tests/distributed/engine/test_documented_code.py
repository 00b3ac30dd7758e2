"""The modules and hooks of docs/own-model.md and docs/data.md train under each axis as in one process."""

from __future__ import annotations

import lightning.pytorch as L
import pytest
import torch

from tests.distributed.jobs import quiet, verified_trainer_for, weights
from tests.document_names import Data, modules_of, names
from tests.documents import ROOT, blocks
from tests.harness import RankError, RankGroup
from tests.pairwise import quick

LAYOUTS = ["dp2", "fsdp2", "tp2", "pp2"]


def _code() -> dict[str, str]:
    """Returns the blocks with modules or methods, by page and line."""
    pages = [ROOT / "docs/own-model.md", ROOT / "docs/data.md"]
    found = [(page, block) for page in pages for block in blocks(page) if block.kind == "python" and not block.not_run]
    return {f"{page.name}:{block.line}": block.text for page, block in found if "(self" in block.text}


CODE = _code()
KEPT = [(place, LAYOUTS[number % 4]) for number, place in enumerate(CODE)]
"""One layout for each block; the others are slow."""


def fit(layout: str, text: str) -> dict[str, torch.Tensor]:
    """Trains with the code of a block; returns the weights."""
    quiet()
    executed = {"__name__": "__main__"} | names()
    exec(compile(text, "block", "exec"), executed)
    (kind,) = modules_of(executed)
    L.seed_everything(7, verbose=False)
    module = kind()
    trainer, replicas = verified_trainer_for(layout, max_epochs=1)
    trainer.fit(module, Data(4 // replicas))
    return weights(trainer, module)


@pytest.mark.parametrize(("place", "layout"), quick([(place, layout) for place in CODE for layout in LAYOUTS], *KEPT))
def test_documented_code_trains_as_in_one_process(ranks2: RankGroup, place: str, layout: str) -> None:
    if "automatic_optimization = False" in CODE[place] and layout == "pp2":
        with pytest.raises(RankError, match="optimizes manually"):
            ranks2.call(fit, layout, CODE[place])
        return
    expected, found = fit("dp1", CODE[place]), ranks2.call(fit, layout, CODE[place])[0]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
