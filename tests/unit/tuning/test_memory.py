"""The pure half of memory probes, and the tracker against sizes that are known."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_hybrid.adapt.memory import MemoryFit, fit_peaks, fit_profiles, search_largest
from lightning_hybrid.batches import tiled_batch
from lightning_hybrid.tuning.memory_probe.collectives import without_peers
from lightning_hybrid.tuning.memory_probe.probe import is_out_of_memory
from lightning_hybrid.tuning.memory_probe.tracker import MemoryTracker
from tests.harness import start_fake_ranks

CPU = torch.device("cpu")

# ---- the fit


def test_a_fit_of_peaks_is_the_line_through_them() -> None:
    fit = fit_peaks(100, {1: 999, 2: 20 + 2 * 7, 4: 20 + 4 * 7})  # that of size 1 isn't used
    assert fit.lines == ((20.0, 7.0),)
    assert [fit.predict(b) for b in (1, 10, 100)] == [100, 100, 720]


def test_a_fit_of_profiles_finds_where_the_peak_goes_from_one_place_to_another() -> None:
    def profile(size: int) -> list[int]:
        return [50 + size, 10 + 9 * size, 1000 + size, 200 + 5 * size, 40]

    fit = fit_profiles(0, {2: profile(2), 4: profile(4)})
    for size in (1, 2, 50, 124, 125, 126, 200, 1000):
        assert fit.predict(size) == max(profile(size))
    assert len(fit.lines) == 2


def test_profiles_of_different_length_are_fitted_by_their_peaks() -> None:
    assert fit_profiles(0, {2: [1, 14], 4: [1, 18, 3]}).lines == ((10.0, 2.0),)


def test_the_largest_size_is_the_last_within_the_budget() -> None:
    source = random.Random(1)
    for _ in range(300):
        lines = tuple((source.uniform(0, 1000), c) for c in sorted(source.uniform(0.1, 50) for _ in range(3)))
        fit = MemoryFit(optimizer_bytes=source.randrange(2000), lines=lines)
        budget, at_most = source.randrange(1, 5000), source.randrange(1, 100)
        expected = max([b for b in range(1, at_most + 1) if fit.predict(b) <= budget], default=0)
        assert fit.largest(budget, at_most) == expected


def test_a_peak_that_falls_is_taken_as_constant() -> None:
    fit = fit_peaks(0, {2: 50, 4: 40})
    assert (fit.predict(1), fit.predict(1000), fit.largest(49, 10), fit.largest(50, 10)) == (50, 50, 0, 10)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fit_peaks(0, {2: 1}), r"`peaks` must have at least two sizes\. Got \[2\]"),
        (lambda: fit_profiles(0, {2: [1]}), r"`profiles` must have two sizes\. Got \[2\]"),
        (lambda: MemoryFit(optimizer_bytes=0, lines=()), r"`lines` must have at least one"),
        (lambda: search_largest([], 1, bool), r"`ladder` must have whole numbers .* Got \[\]"),
        (lambda: search_largest([2, 2], 1, bool), r"`ladder` must have .* ascending\. Got \[2, 2\]"),
    ],
)
def test_what_a_fit_and_a_search_refuse(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- the search


def test_a_search_returns_the_largest_that_fits_and_only_what_it_has_tried() -> None:
    source = random.Random(2)
    for _ in range(2000):
        ladder = sorted(source.sample(range(1, 300), source.randint(1, 40)))
        limit, start, tried = source.randint(0, 310), source.randint(-3, 320), {}

        def fits(size: int, tried: Any = tried, limit: int = limit) -> bool:
            assert size not in tried
            tried[size] = size <= limit
            return tried[size]

        found = search_largest(ladder, start, fits)
        assert found == max((s for s in ladder if s <= limit), default=None)
        assert found is None or tried[found]


def test_what_fits_by_chance_is_still_only_what_was_tried() -> None:
    source = random.Random(3)
    for _ in range(500):
        tried: dict[int, bool] = {}

        def fits(size: int, tried: Any = tried) -> bool:
            return tried.setdefault(size, source.random() < 0.5)

        found = search_largest(range(1, 100), source.randint(1, 100), fits)
        assert found is None or tried[found]


@pytest.mark.parametrize(("start", "trials"), [(500, 2), (501, 2), (499, 4), (1, 18)])
def test_a_good_guess_saves_trials(start: int, trials: int) -> None:
    tried = []
    found = search_largest(range(1, 1001), start, lambda size: tried.append(size) or size <= 500)
    assert (found, len(tried)) == (500, trials)


# ---- the tracker


def test_the_tracker_counts_what_is_alive_at_once() -> None:
    tracker = MemoryTracker(CPU)
    with tracker:
        a = torch.empty(1000)  # 4000
        b = a * 2  # 8000
        del a  # 4000
        c = b.view(10, 100)[0]  # a view takes nothing
        b = torch.cat([b, b])  # 12000: the view keeps what it looks at
        del c  # 8000
        d = b.double()  # 24000
    del b, d
    assert tracker.profile()[1:] == [4000, 8000, 12000, 24000]
    assert tracker.peak_bytes == 24000


def test_the_tracker_counts_what_was_there_before_and_freed_storages() -> None:
    before, unread, freed = torch.ones(100), torch.ones(10), torch.ones(1000)
    tracker = MemoryTracker(CPU)
    tracker.count([unread, freed])
    with tracker:
        made = before + 1
        freed.untyped_storage().resize_(0)
        large = torch.empty(500)
        freed.untyped_storage().resize_(4000)
    assert tracker.peak_bytes == 4 * (100 + 10 + 1000 + 100 + 500)
    assert "resize_" not in torch.UntypedStorage.__dict__
    del made, large


def test_the_tracker_sees_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 1))
    weights = sum(p.nbytes for p in model.parameters())
    x, tracker = torch.ones(100, 64), MemoryTracker(CPU)
    tracker.count(model.parameters())
    with tracker:
        model(x).sum().backward()
    activations = 4 * 100 * 256
    # at the end: the gradients; before, in `tanh`'s backward: output, gradient of the output and that of the input
    assert tracker.peak_bytes >= weights + x.nbytes + 3 * activations
    assert tracker.peak_bytes <= 2 * weights + x.nbytes + 3.1 * activations


# ---- batches


def test_batches_of_any_size_repeat_the_samples() -> None:
    batch = {"x": torch.arange(6).view(3, 2), "names": ["a", "b", "c"], "rate": 0.5, "pair": (torch.arange(3), None)}
    longer = tiled_batch(batch, 5)
    assert longer["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert longer["names"] == ["a", "b", "c", "a", "b"]
    assert (longer["rate"], longer["pair"][0].tolist(), longer["pair"][1]) == (0.5, [0, 1, 2, 0, 1], None)
    assert tiled_batch(batch, 2)["x"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("batch", [{}, [torch.ones(2), torch.ones(3)], torch.ones(0, 4)])
def test_batches_without_a_size_are_refused(batch: Any) -> None:
    with pytest.raises(ValueError, match="makes batches of other sizes from the first one"):
        tiled_batch(batch, 4)


# ---- errors


def test_which_errors_mean_too_little_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**50)
    wrapped = RuntimeError("a stage failed")
    wrapped.__cause__ = torch.OutOfMemoryError()
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(wrapped)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("something else"))


# ---- collectives


@pytest.fixture
def alone() -> None:
    start_fake_ranks(4)


@pytest.mark.usefixtures("alone")
def test_collectives_need_no_peer_and_give_what_the_others_would_send() -> None:
    x = torch.arange(4.0)
    with without_peers():
        for reduced in (x.clone(), x.clone()):
            work: Any = dist.all_reduce(reduced, async_op=True)
            assert work.wait()
            assert torch.equal(reduced, x)
        gathered = [torch.empty(4) for _ in range(4)]
        dist.all_gather(gathered, x)
        whole, share, exchanged = torch.empty(16), torch.empty(1), torch.empty(6)
        dist.all_gather_into_tensor(whole, x)
        dist.reduce_scatter_tensor(share, x)
        dist.all_to_all_single(exchanged, x, [3, 1, 1, 1], [1, 1, 1, 1])
        received, vote = torch.full((50,), torch.nan), torch.zeros(1, dtype=torch.int32)
        dist.recv(received, 1)
        ops = [dist.P2POp(dist.irecv, vote, 1), dist.P2POp(dist.isend, x, 2)]
        for work in dist.batch_isend_irecv(ops):
            work.wait()
        dist.barrier()
        objects: list[Any] = [None] * 4
        dist.all_gather_object(objects, "mine")
    assert torch.equal(torch.stack(gathered), x.expand(4, 4))
    assert torch.equal(whole, x.repeat(4))
    assert share.tolist() == [0.0]
    assert exchanged.tolist() == [0, 1, 2, 3, 0, 1]
    assert received.isfinite().all()
    assert vote.item() == 1
    assert objects == ["mine"] * 4


@pytest.mark.usefixtures("alone")
def test_functional_collectives_have_the_shapes_of_real_ones() -> None:
    import torch.distributed._functional_collectives as functional

    x: torch.Tensor = torch.arange(8.0).view(4, 2)
    group: Any = dist.group.WORLD
    with without_peers():
        assert functional.all_reduce(x, "sum", group).tolist() == x.tolist()
        assert functional.all_gather_single(x, 0, group).shape == (16, 2)
        assert functional.reduce_scatter_single(x, "sum", 0, group).shape == (1, 2)
        assert functional.all_to_all_single(x, [1, 2, 3, 4], [1, 1, 1, 1], group).shape == (10, 2)


@pytest.mark.usefixtures("alone")
def test_uneven_coalesced_and_rooted_collectives_need_no_peer() -> None:
    from torch.distributed.distributed_c10d import _coalescing_manager

    x, root = torch.arange(4.0), 1
    world: Any = dist.group.WORLD
    with without_peers():
        exchanged = [torch.empty(n) for n in (3, 1, 0, 2)]
        dist.all_to_all(exchanged, [x[:2], x[2:], x[:0], x[:0]])
        broadcast, scattered = torch.full((2,), torch.nan), torch.full((2,), torch.nan)
        dist.broadcast(broadcast, root)
        dist.scatter(scattered, None, root)
        gathered = [torch.empty(4) for _ in range(4)]
        dist.gather(x, gathered, dst=0)
        first, second = x.clone(), x + 1
        with _coalescing_manager():
            dist.all_reduce(first)
            dist.all_reduce(second)
        world.monitored_barrier()
    assert [e.tolist() for e in exchanged[:3]] == [[0, 1, 0], [2], []]
    assert all(t.isfinite().all() for t in (exchanged[3], broadcast, scattered))
    assert torch.equal(torch.stack(gathered), x.expand(4, 4))
    assert torch.equal(first, x)
    assert torch.equal(second, x + 1)


@pytest.mark.usefixtures("alone")
def test_groups_are_as_before_after_an_error() -> None:
    groups: list[Any] = [dist.group.WORLD, dist.new_group([0, 2])]
    groups[1].bound_device_id = torch.device("cpu:0")

    def state() -> list[Any]:
        return [
            (g.group_name, g.group_desc, g.bound_device_id, d, g._get_backend(d))  # noqa: SLF001
            for g in groups
            for d in g._device_types  # noqa: SLF001
        ]

    before = state()
    for _ in range(2):
        try:
            with without_peers():
                inside = state()
                raise KeyError
        except KeyError:
            assert state() == before
        for real, fake in zip(before, inside, strict=True):
            assert real[:2] == fake[:2]
            assert real[-1] is not fake[-1]
    made: Any = dist.new_group([0, 1])
    assert dist.get_process_group_ranks(made) == [0, 1]


@pytest.mark.usefixtures("alone")
def test_what_needs_other_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    world: Any = dist.distributed_c10d._world  # noqa: SLF001
    unlisted: Any = dist.new_group([0, 1])
    monkeypatch.delitem(world.pg_map, unlisted)
    with without_peers():
        with pytest.raises(
            NotImplementedError, match="no local substitute for `c10d::allreduce_` of this process group"
        ):
            unlisted.allreduce([torch.ones(1)])
        with pytest.raises(NotImplementedError, match="A process group cannot be made while a rank runs without"):
            dist.new_group([0, 1])
