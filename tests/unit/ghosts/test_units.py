"""Which modules are blocks, and which may begin a stage."""

import torch
from torch import nn

from lightning_hybrid.ghosts.units import CallInterceptor, find_units


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x):
        return self.mlp(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Module()
        self.body.embed = nn.Embedding(5, 4)
        self.body.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 5)


def test_elements_of_a_stack_are_blocks_and_are_not_opened():
    units = find_units(Model())
    assert units.blocks == ("body.layers.0", "body.layers.1", "body.layers.2")
    assert units.names == ("body.embed", *units.blocks, "head")


def test_without_a_stack_the_children_are_units():
    model = nn.Module()
    model.net = nn.Module()
    model.net.rnn, model.net.out = nn.LSTM(4, 4), nn.Linear(4, 4)
    assert find_units(model).names == ("net.rnn", "net.out")
    assert find_units(model).blocks == ()


def test_a_sequential_of_sequentials_is_opened():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Layer(), Layer()), nn.Sequential(Layer(), Layer()))
    assert find_units(model).blocks == ("1.0", "1.1", "2.0", "2.1")


def test_the_switch_hands_over_calls_only_while_a_handler_is_active():
    model, calls = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), []

    class Handler:
        def unit_call(self, name, call, args, kwargs):
            calls.append(name)
            return call(*args, **kwargs)

        def metric_call(self, metric, kind, call, args, kwargs):
            raise AssertionError

    interceptor = CallInterceptor(model, find_units(model))
    interceptor.install()
    x = torch.ones(1, 2)
    expected = model(x)
    with interceptor.handled_by(Handler()):
        assert torch.equal(model(x), expected)
    assert calls == ["0", "1"]
    interceptor.remove()
    assert model[0]._compiled_call_impl is None
