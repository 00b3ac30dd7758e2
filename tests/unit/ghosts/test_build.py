"""Models built on ghosts become the same, bit for bit, as models built as usual; and draw the same random numbers."""

from typing import Any

import pytest
import torch
from torch import nn

from lightning_hybrid.ghosts.deferred_init import recorded_init
from lightning_hybrid.ghosts.ghost import Ghost
from lightning_hybrid.ghosts.parameters import Parameters


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.empty(4, 8))
        nn.init.trunc_normal_(self.position, std=0.1)
        self.scale = nn.Parameter(torch.randn(3) * 2)
        self.square = nn.Parameter(torch.empty(5, 5))
        nn.init.orthogonal_(self.square)
        self.embed = nn.Embedding(6, 4, padding_idx=0)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(4)
        self.rnn = nn.LSTM(4, 4)
        with torch.no_grad():
            self.frozen.weight[0].fill_(0.5)
            self.frozen.bias.copy_(torch.arange(4.0))


BUILDERS = [lambda: nn.TransformerEncoderLayer(8, 2, 16), Own, llama, lambda: nn.MultiheadAttention(8, 2)]


@pytest.mark.parametrize("build", BUILDERS)
def test_the_same_weights_and_random_numbers(build):
    torch.manual_seed(3)
    expected = build()
    after = torch.rand(1)
    torch.manual_seed(3)
    with recorded_init() as deferred_init:
        module = build()
    assert torch.equal(torch.rand(1), after)
    parameters = Parameters(module)
    ghosts = [n for n in parameters.names if isinstance(parameters[n], Ghost)]
    assert ghosts, "weights of torch's own modules have no storage"
    for name in ghosts:
        ghost: Any = parameters[name]
        parameters.put(name, nn.Parameter(deferred_init.make_real(ghost), requires_grad=parameters.requires_grad[name]))
    deferred_init.make_buffers_real(module)
    state = module.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(state[name], value), name
    assert [p.requires_grad for p in module.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert len(list(module.parameters())) == len(list(expected.parameters())), "tied weights stay one"
