"""Byte windows over the standard library: what is in them, what is held out, who gets which."""

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_hybrid.data import ByteWindows, StdlibText, read_bytes, stdlib_modules, stdlib_sources
from lightning_hybrid.data.stdlib import TABLES
from lightning_hybrid.dataloader.sharding import shard_samples
from tests.pairwise import quick


class Replica(Trainer):
    """A Trainer as one data-parallel replica sees it."""

    def __init__(self, replicas: int, replica: int) -> None:
        self._kwargs = {"num_replicas": replicas, "rank": replica}

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        return self._kwargs


def module(batch_size: int = 8, replicas: int | None = None, replica: int = 0, **kwargs: object) -> StdlibText:
    data = StdlibText(batch_size=batch_size, context_length=64, evaluation_windows=20, **kwargs)  # pyright: ignore[reportArgumentType]
    if replicas is not None:
        data.trainer = Replica(replicas, replica)
    return data


def test_modules_are_importable_names_of_this_interpreter_in_sorted_order() -> None:
    modules = stdlib_modules()
    assert modules == sorted(modules)
    assert {"argparse", "email", "json", "logging"} <= set(modules)
    assert not {"site-packages", "dist-packages", "torch", "lightning", "__pycache__"} & set(modules)
    assert {"json", "email"} <= set(modules) & sys.stdlib_module_names


def test_sources_are_sorted_whatever_the_order_of_the_request() -> None:
    files = stdlib_sources(["logging", "argparse", "json"])
    assert files == stdlib_sources(["json", "logging", "argparse"])
    assert files[0].name == "argparse.py"
    assert {file.parent.name for file in files[1:]} == {"json", "logging"}
    assert files[1:] == sorted(files[1:], key=lambda file: file.parts)
    assert all("site-packages" not in file.parts for file in files)


def test_sources_of_an_unknown_module_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`modules` must name packages .* Got 'no_such_package', which has no Python"):
        stdlib_sources(["email", "no_such_package"])


def test_files_are_joined_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\x00\xff")
    (tmp_path / "b").write_bytes("é".encode())
    text = read_bytes([tmp_path / "a", tmp_path / "b"])
    assert text.dtype == torch.uint8
    assert bytes(text.tolist()) == b"\x00\xff\n\xc3\xa9\n"


def test_windows_follow_each_other_and_targets_are_one_ahead() -> None:
    windows = ByteWindows(torch.arange(13, dtype=torch.uint8), context_length=4)
    assert len(windows) == 3
    for index, (tokens_T, targets_T) in enumerate(windows[index] for index in range(3)):
        assert tokens_T.tolist() == list(range(4 * index, 4 * index + 4))
        assert targets_T.tolist() == list(range(4 * index + 1, 4 * index + 5))
        assert tokens_T.dtype == torch.int64


def test_limited_windows_are_spread_over_the_whole_text() -> None:
    windows = ByteWindows(torch.arange(101, dtype=torch.uint8), context_length=10, limit=4)
    assert [windows[index][0][0].item() for index in range(len(windows))] == [0, 20, 50, 70]


def test_text_shorter_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`context_length` must leave room for a window of 8 \+ 1 bytes\. Got .* 8 "):
        ByteWindows(torch.zeros(8, dtype=torch.uint8), context_length=8)


def test_held_out_packages_are_not_trained_on() -> None:
    data = module()
    data.setup("fit")
    data.setup("test")
    training = set(stdlib_modules()) - {*data.validation_modules, *data.test_modules, *TABLES}
    assert data._training is not None
    assert len(data._training) == (len(read_bytes(stdlib_sources(sorted(training)))) - 1) // 64
    assert not set(data.validation_modules) & set(data.test_modules)


def global_batches(data: list[StdlibText], loader: str, count: int) -> list[Tensor]:
    """Return the first global batches: the replicas' parts, as the strategy shards them, in an order of content."""
    loaders = [getattr(replica, loader)() for replica in data]
    shares = [
        list(shard_samples(own.sampler, own.batch_size, r, len(loaders), drop_last=True))
        for r, own in enumerate(loaders)
    ]
    assert {len(of_replica) for of_replica in shares} == {len(loaders[0].dataset) // 8}
    batches = []
    for step in range(count):
        windows = [own.dataset[k][0] for own, found in zip(loaders, shares, strict=True) for k in found[step].keys]
        batches.append(torch.stack(sorted(windows, key=lambda window_T: window_T.tolist())))
    return batches


@pytest.mark.parametrize(
    ("loader", "replicas"),
    quick(
        itertools.product(["train_dataloader", "val_dataloader"], [1, 2, 4, 8]),
        ("train_dataloader", 4),
        ("val_dataloader", 2),
    ),
)
def test_global_batches_do_not_depend_on_the_number_of_replicas(loader: str, replicas: int) -> None:
    alone = module()
    together = [module(replicas=replicas, replica=replica) for replica in range(replicas)]
    for data in [alone, *together]:
        data.setup("fit")
    for expected, actual in zip(global_batches([alone], loader, 2), global_batches(together, loader, 2), strict=True):
        assert torch.equal(expected, actual)


def test_training_order_is_shuffled_by_the_seed_and_the_epoch() -> None:
    def first_batch(seed: int, epoch: int) -> Tensor:
        data = module(seed=seed)
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)  # pyright: ignore[reportAttributeAccessIssue]
        return next(iter(loader))[0]

    assert torch.equal(first_batch(0, 0), first_batch(0, 0))
    assert not torch.equal(first_batch(0, 0), first_batch(1, 0))
    assert not torch.equal(first_batch(0, 0), first_batch(0, 1))


def test_each_held_out_window_is_evaluated_once() -> None:
    data = module(batch_size=8)
    data.setup("validate")
    data.setup("test")
    assert [len(loader) for loader in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader())] == [
        2
    ] * 3
    assert data.evaluation_windows == 16
    windows = torch.cat([tokens_BT for tokens_BT, _ in data.val_dataloader()])
    assert len(torch.unique(windows, dim=0)) == 16


def test_batch_that_replicas_can_not_share_is_refused() -> None:
    data = module(batch_size=8, replicas=3)
    data.setup("fit")
    with pytest.raises(ValueError, match=r"`batch_size` .* multiple of the 3 data-parallel replicas\. Got 8\. Use 6\."):
        data.train_dataloader()


def test_evaluation_smaller_than_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`evaluation_windows` must be at least `batch_size`.* Got 20 with .* 32"):
        module(batch_size=32)


def test_loading_before_reading_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Call `setup` with the stage first"):
        module().train_dataloader()


def test_batch_is_that_of_one_process_when_the_strategy_is_not_parallel() -> None:
    data = module()
    data.trainer = SimpleNamespace(distributed_sampler_kwargs=None)  # pyright: ignore[reportAttributeAccessIssue]
    data.setup("fit")
    tokens_BT, targets_BT = next(iter(data.train_dataloader()))
    assert tokens_BT.shape == targets_BT.shape == (8, 64)
    assert torch.equal(tokens_BT[:, 1:], targets_BT[:, :-1])
