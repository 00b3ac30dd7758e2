"""What the inferred tensor plans are, for models of the zoo and modules written by hand."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate

from lightning_hybrid.ghosts.dry_run import trace_step
from lightning_hybrid.ghosts.record import Trace, UnitCall
from lightning_hybrid.ghosts.units import CallInterceptor, find_units
from lightning_hybrid.ghosts.use import record_use
from lightning_hybrid.spec.errors import PartitionError
from lightning_hybrid.spec.tensor_plan import TensorPlan, UnitPlan
from lightning_hybrid.tensor.infer import infer_tensor_plan
from tests.zoo.cases import CASES


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Many tiny operations: threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def plan_of(name: str, size: int = 2, overrides: dict[str, str] | None = None) -> TensorPlan:
    """The plan of a case of the zoo."""
    root, trace = _traced(name)
    return infer_tensor_plan(root, trace.calls, size, overrides, trace.use)


@cache
def _traced(name: str) -> tuple[nn.Module, Trace]:
    """A case of the zoo and its dry run on ghosts."""
    torch.manual_seed(0)
    root = CASES[name].build()
    root.__dict__["log"] = lambda *args, **kwargs: None
    generator = torch.Generator().manual_seed(0)
    batch = default_collate([CASES[name].sample(generator) for _ in range(4)])
    units = find_units(root)
    interceptor = CallInterceptor(root, units)
    interceptor.install()
    trace = trace_step(
        root, interceptor, root.training_step, (batch, 0), device=torch.device("cpu"), use_of=units.names
    )
    interceptor.remove()
    return root, trace


def block_of(plan: TensorPlan, stack: str) -> UnitPlan:
    """The plan of the last block of a stack; all blocks of the zoo's models are alike from the second on."""
    return next(unit for name, unit in reversed(plan.units.items()) if f"{stack}." in f"{name}." and unit.rowwise)


def test_llama_has_the_canonical_plan() -> None:
    plan = plan_of("llama")
    block = block_of(plan, "layers")
    assert block.rowwise == ("self_attn.o_proj", "mlp.down_proj")
    assert block.colwise == (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj",
    )  # fmt: skip
    assert (block.attributes, block.shared_outputs, block.partial, block.slices) == ({}, {}, (), ())
    assert plan.embeddings == ("net.model.embed_tokens",)
    assert plan.gathered == ("net.lm_head",)
    assert plan.fraction > 0.98


# rows of the last block, columns of the last block (by their last names)
BLOCKS = {
    "mistral": ("layers", "o_proj down_proj", "q_proj k_proj v_proj gate_proj up_proj"),
    "qwen2": ("layers", "o_proj down_proj", "q_proj k_proj v_proj gate_proj up_proj"),
    "gemma": ("layers", "o_proj down_proj", "q_proj k_proj v_proj gate_proj up_proj"),
    "gpt2": ("h", "c_proj c_proj", "c_attn c_fc"),
    "gpt_neox": ("layers", "dense dense_4h_to_h", "query_key_value dense_h_to_4h"),
    "bloom": ("h", "dense dense_4h_to_h", "query_key_value dense_h_to_4h"),
    "phi": ("layers", "dense fc2", "q_proj k_proj v_proj fc1"),
    "phi3": ("layers", "o_proj down_proj", "qkv_proj gate_up_proj"),
    "opt": ("layers", "out_proj fc2", "q_proj k_proj v_proj fc1"),
    "bert": ("layer", "dense dense", "query key value dense"),
    "roberta": ("layer", "dense dense", "query key value dense"),
    "distilbert": ("layer", "out_lin lin2", "q_lin k_lin v_lin lin1"),
    "bart": ("decoder.layers", "out_proj out_proj fc2", "q_proj k_proj v_proj q_proj k_proj v_proj fc1"),
    "whisper": ("decoder.layers", "out_proj out_proj fc2", "q_proj k_proj v_proj q_proj k_proj v_proj fc1"),
    "t5": ("encoder.block.1", "wo", "wi"),
    "mixtral": ("layers", "o_proj", "q_proj k_proj v_proj"),
    "vit": ("layers", "o_proj fc2", "q_proj k_proj v_proj fc1"),
    "tied": ("blocks", "proj 2", "qkv 0"),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_regions(name: str) -> None:
    stack, rows, columns = BLOCKS[name]
    block = block_of(plan_of(name), stack)
    assert " ".join(n.rpartition(".")[2] for n in block.rowwise) == rows
    assert " ".join(n.rpartition(".")[2] for n in block.colwise) == columns


def test_query_norm_is_replicated_with_a_partial_gradient() -> None:
    assert set(block_of(plan_of("qwen3"), "layers").partial) == {"self_attn.q_norm.weight", "self_attn.k_norm.weight"}


def test_fused_weights_are_divided_by_section_and_head() -> None:
    block = block_of(plan_of("gpt2"), "h")
    order = block.parameters["attn.c_attn.weight"].order
    assert order is not None
    width = len(order) // 3
    first = [*range(width // 2), *range(width, width + width // 2), *range(2 * width, 2 * width + width // 2)]
    assert list(order[: len(order) // 2]) == first
    assert block.parameters["attn.c_attn.weight"].dim == 1
    assert block_of(plan_of("gpt_neox"), "layers").parameters["attention.query_key_value.weight"].order is None


def test_position_biases_by_head_are_sliced() -> None:
    (cut,) = block_of(plan_of("bloom"), "h").slices
    assert cut.path == ("kwargs", "alibi")
    assert cut.owners == (0, 0, 1, 1)


def test_rope_part_of_latent_attention_is_shared() -> None:
    block = block_of(plan_of("deepseek_v3"), "layers")
    assert set(block.colwise) >= {"self_attn.kv_b_proj"}
    assert set(block.shared_outputs) == {"self_attn.kv_a_proj_with_mqa"}


def test_fewer_key_heads_than_ranks() -> None:
    block = block_of(plan_of("llama", 4), "layers")
    assert set(block.selected_outputs) == {"self_attn.k_proj", "self_attn.v_proj"}
    assert "self_attn.o_proj" in block.rowwise


def test_state_space_block_has_one_region_with_two_rows() -> None:
    block = block_of(plan_of("mamba"), "layers")
    assert block.rowwise == ("mixer.x_proj", "mixer.out_proj")
    assert {"mixer.conv1d.weight", "mixer.A_log", "mixer.D"} <= set(block.parameters)


def test_norm_over_all_heads_keeps_attention_replicated() -> None:
    plan = plan_of("olmo2")
    assert block_of(plan, "layers").rowwise == ("mlp.down_proj",)
    assert "net.model.layers.0.self_attn.o_proj" in plan.reasons


def test_multihead_attention_modules() -> None:
    plan = plan_of("encoder")
    assert len(plan.attention) == 4
    assert all(unit.rowwise in ((), ("linear2",)) for unit in plan.units.values())
    name = plan.attention[0]
    assert plan.parameters[f"{name}.out_proj.weight"].dim == 1
    assert plan.parameters[f"{name}.in_proj_weight"].order is not None


def test_without_regions_outputs_are_gathered() -> None:
    plan = plan_of("resnet")
    assert plan.gathered
    assert not any(unit.rowwise for unit in plan.units.values())


def test_tied_embedding_and_head_are_divided_alike() -> None:
    plan = plan_of("gpt2")
    assert plan.parameters["net.transformer.wte.weight"] == plan.parameters["net.lm_head.weight"]


class ByHand(nn.Module):
    """A head that is the embedding's weight, used directly."""

    def __init__(self, direct: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        self.direct = direct

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.mlp(self.embedding(ids))
        return hidden @ self.embedding.weight.T if self.direct else hidden


@pytest.mark.parametrize("direct", [False, True])
def test_a_weight_that_is_used_directly_stays_whole(direct: bool) -> None:
    root = ByHand(direct)
    with record_use(root, ["mlp"]) as use:
        root(torch.zeros(2, 8, dtype=torch.long))
    hidden = torch.randn(2, 8, 16, requires_grad=True)
    plan = infer_tensor_plan(root, [UnitCall(name="mlp", args=(hidden,))], 2, use=use)
    assert plan.embeddings == (() if direct else ("embedding",))
    assert plan.units["mlp"].rowwise == ("2",)
    assert plan.units["mlp"].colwise == ("0",)


class Squashed(nn.Module):
    """Two ways through a block; the second joins all channels."""

    def __init__(self, joined: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)
        self.joined = joined

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = F.relu(self.first(x), inplace=True)
        return self.second(hidden * hidden.mean(-1, keepdim=True) if self.joined else hidden)


def _squashed(joined: bool, size: int = 2, overrides: dict[str, str] | None = None) -> TensorPlan:
    root = nn.Sequential(Squashed(joined))
    return infer_tensor_plan(root, [UnitCall(name="0", args=(torch.randn(4, 8, requires_grad=True),))], size, overrides)


def test_a_channel_mix_is_no_region_and_falls_back_to_gathering() -> None:
    plan = _squashed(True)
    assert plan.units["0"].rowwise == ()
    assert plan.gathered == ("0.first", "0.second")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_may_be_real_or_meta_and_stay_untouched(device: str) -> None:
    root = nn.Sequential(Squashed(False)).to(device)
    root.train()
    state = {name: (id(p), p.device.type) for name, p in root.named_parameters()}
    keys, rng = set(root[0].first.__dict__), torch.get_rng_state()
    plan = infer_tensor_plan(root, [UnitCall(name="0", args=(torch.randn(4, 8, requires_grad=True),))], 2)
    assert plan.units["0"].rowwise == ("second",)
    assert state == {name: (id(p), p.device.type) for name, p in root.named_parameters()}
    assert keys == set(root[0].first.__dict__)
    assert root.training
    assert root[0].training
    torch.manual_seed(0)
    torch.set_rng_state(rng)


def test_plans_are_equal_and_picklable() -> None:
    plan = plan_of("llama")
    assert plan == plan_of("llama")
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert ("4 x net.model.layers.*.mlp.down_proj", "tp: rowwise") in plan.rows()


def test_overrides() -> None:
    plan = plan_of("llama", overrides={"*.mlp.*": "replicate", "*.o_proj": "rowwise"})
    assert block_of(plan, "layers").rowwise == ("self_attn.o_proj",)
    plan = plan_of("llama", overrides={"*.lm_head": "replicate"})
    assert not plan.gathered
    plan = plan_of("encoder", overrides={"*.linear1": "colwise_gather"})
    assert len([n for n in plan.gathered if n.endswith("linear1")]) == 4


def test_an_override_that_gives_wrong_numbers_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"`tensor_plan`: `0.first` cannot be 'rowwise' with tp=2"):
        _squashed(False, overrides={"*.first": "rowwise"})


def test_a_pattern_without_module_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`tensor_plan`: the pattern .* matches no"):
        _squashed(False, overrides={"*.nothing": "rowwise"})


def test_nothing_to_divide_names_the_sizes_that_work() -> None:
    with pytest.raises(PartitionError, match=r"(?s)`layout`: tp=3 cannot divide.*not divisible by 3.*tp2, tp4, tp8"):
        _squashed(False, size=3)
