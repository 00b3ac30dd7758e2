"""The text form of layouts, and the errors that name what would be valid."""

import dataclasses
import math
import pickle

import pytest

from lightning_hybrid.spec import Layout, PartitionError


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("dp1", Layout()),
        ("dp2", Layout(dp=2)),
        ("fsdp4", Layout(fsdp=4)),
        ("tp2-pp2", Layout(tp=2, pp=2)),
        ("dp2-fsdp3-tp4-pp5", Layout(dp=2, fsdp=3, tp=4, pp=5)),
        ("dp16-pp12", Layout(dp=16, pp=12)),
        ("fsdp2-ep4-tp2", Layout(fsdp=2, ep=4, tp=2)),
    ],
)
def test_text_form_is_read_and_written_back(text: str, layout: Layout) -> None:
    assert Layout.parse(text) == layout
    assert str(layout) == text


@pytest.mark.parametrize(
    ("text", "written"), [("pp2-dp4", "dp4-pp2"), ("dp1-tp2", "tp2"), ("dp1-fsdp1-tp1-pp1", "dp1"), ("pp1", "dp1")]
)
def test_any_order_and_explicit_ones_are_read_and_written_in_one_form(text: str, written: str) -> None:
    assert str(Layout.parse(text)) == written


@pytest.mark.parametrize("text", ["", "-", "dp", "2", "dp2-", "-dp2", "dp-2", "dp2,pp2", "DP2", "dp 2", "dp2.0", "2dp"])
def test_garbage_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"`layout` must be axes with sizes joined by '-', such as 'dp2-tp2-pp2'"):
        Layout.parse(text)


def test_unknown_axis_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"has the axes dp, fsdp, ep, tp, pp\. .* unknown axis 'xp'"):
        Layout.parse("dp2-xp2")


def test_repeated_axis_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each axis at most once\. Got 'dp2-tp2-dp4', which names 'dp' twice"):
        Layout.parse("dp2-tp2-dp4")


def test_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a size of at least 1\. Got 'dp2-pp0', where 'pp' is 0"):
        Layout.parse("dp2-pp0")


@pytest.mark.parametrize("value", [None, 4, ["dp2"]])
def test_what_is_no_text_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match=r"`layout` must be text such as 'dp2-tp2-pp2'\. Got "):
        Layout.parse(value)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2", None])
def test_size_must_be_a_whole_number_of_at_least_one(size: object) -> None:
    with pytest.raises(ValueError, match=r"`tp` must be a whole number of at least 1\. Got "):
        Layout(tp=size)  # pyright: ignore[reportArgumentType]


def test_devices_and_replicas_are_products_of_sizes() -> None:
    layout = Layout(dp=2, fsdp=3, tp=5, pp=7)
    assert layout.devices == 210
    assert layout.replicas == 6
    assert Layout(dp=2, fsdp=3, ep=5, tp=7).replicas == 30


def test_with_fsdp_all_ranks_that_share_a_weight_outside_the_experts_shard_it() -> None:
    assert Layout(dp=2, fsdp=3, ep=5).shards == 15
    assert Layout(dp=2, ep=5).shards == 1


def test_layout_is_immutable_hashable_and_can_be_sent_to_other_processes() -> None:
    layout = Layout(dp=2, pp=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.dp = 4  # pyright: ignore[reportAttributeAccessIssue]
    assert {layout: 1}[Layout.parse("dp2-pp2")] == 1
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_layout_that_uses_every_device_is_valid() -> None:
    Layout(dp=2, tp=2, pp=2).validate(8)
    Layout().validate(1)


@pytest.mark.parametrize(
    ("text", "devices", "message"),
    [
        ("dp2-pp2", 8, r"Got 'dp2-pp2', which needs 2 × 2 = 4, with 8 devices\. .* a layout for 8: 'dp4-pp2', "),
        ("tp2-pp2", 8, r"a layout for 8: 'dp2-tp2-pp2', 'fsdp2-tp2-pp2', "),
        ("dp2-tp2-pp2", 4, r"Got 'dp2-tp2-pp2', which needs 2 × 2 × 2 = 8, with 4 devices\. .*: 'tp2-pp2', "),
        ("ep4", 2, r"a layout for 2: 'ep2', "),
        ("dp1", 4, r"Got 'dp1', which needs 1, with 4 devices\. Set the Trainer's .* to 1 in all.*: 'dp4', "),
        ("tp4", 1, r"Got 'tp4', which needs 4, with 1 device\. Set .* to 4 in all, or choose a layout for 1: 'dp1'\."),
    ],
)
def test_wrong_device_count_is_refused_with_the_nearest_valid_layouts(text: str, devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout.parse(text).validate(devices)


def test_long_list_of_alternatives_is_cut_and_counted() -> None:
    with pytest.raises(ValueError, match=r"\(48 more\)\.$"):
        Layout().validate(32)


@pytest.mark.parametrize("devices", [1, 2, 6, 7, 16, 24])
def test_alternatives_are_all_layouts_for_the_devices_once_each(devices: int) -> None:
    alternatives = Layout(dp=2, pp=2).alternatives(devices)
    assert len(set(alternatives)) == len(alternatives)
    assert {layout.devices for layout in alternatives} == {devices}
    exponents = [next(e for e in range(9) if devices % prime ** (e + 1)) for prime in (2, 3, 5, 7)]
    # Each prime's exponent is spread over the four axes independently: C(e + 3, 3) ways.
    assert len(alternatives) == math.prod(math.comb(exponent + 3, 3) for exponent in exponents)


def test_partition_error_is_a_value_error() -> None:
    assert issubclass(PartitionError, ValueError)


def test_the_ranks_of_one_axis_move_to_another():
    assert str(Layout(dp=2, tp=3, pp=4).moved("pp", "dp")) == "dp8-tp3"
    assert str(Layout(fsdp=2, pp=2).moved("pp", "fsdp")) == "fsdp4"
