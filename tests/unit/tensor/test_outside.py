"""Plans of single modules need little memory, however large their tables are."""

from __future__ import annotations

import pytest
from torch import nn

from lightning_hybrid.tensor.outside import NotDivisible, divide_embedding


class Special(nn.Embedding):
    """Treats one row in the middle in another way."""

    def forward(self, ids):
        return super().forward(ids) * (1.0 + (ids == 3)[..., None])


def test_an_embedding_is_verified_on_a_few_rows_of_each_part() -> None:
    embedding, rows = nn.Embedding(4096, 8, device="meta"), list[int]()
    embedding.register_forward_hook(lambda module, args, out: rows.append(out.shape[:-1].numel()))
    divided = divide_embedding(embedding, 4)
    assert divided.parameters["weight"].size == 4096
    assert rows == [8] * 5, "the whole and each of four ranks look up two rows of each part"


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_embedding_with_a_forward_of_its_own_is_not_divided(ranks: int) -> None:
    with pytest.raises(NotDivisible, match="differ from the whole"):
        divide_embedding(Special(12, 4), ranks)


def test_parts_of_one_row() -> None:
    assert divide_embedding(nn.Embedding(4, 8), 4).parameters["weight"].dim == 0
