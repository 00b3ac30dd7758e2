"""Saving and resuming: bit for bit in the same layout, with the same global batches and losses in another one."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lightning_hybrid.checkpoint.consolidate import consolidate
from lightning_hybrid.checkpoint.reader import SavedCheckpoint
from tests.distributed.checkpoint import checkpoint_jobs as jobs
from tests.distributed.reference import reference
from tests.harness import RankError, RankGroup
from tests.pairwise import quick, slow

TWO = ["dp2", "fsdp2", "tp2", "pp2"]
FOUR = ["tp2-pp2", "fsdp2-pp2", "dp2-tp2"]
LAST = 2 * jobs.STEPS_PER_EPOCH


def assert_goes_on(resumed: list[dict], whole: list[dict], step: int) -> None:
    """Bit for bit on every rank: losses, samples, weights, learning rate, buffers and RNG state."""
    for again, before in zip(resumed, whole, strict=True):
        steps = range(step + 1, LAST + 1)
        assert list(again["losses"]) == list(steps)
        assert again["samples"] == {s: before["samples"][s] for s in steps}
        assert again["losses"] == {s: before["losses"][s] for s in steps}
        assert again["weights"].keys() == before["weights"].keys()
        for name, value in before["weights"].items():
            assert torch.equal(again["weights"][name], value), name
        assert (again["lr"], again["seen"], again["random"]) == (before["lr"], before["seen"], before["random"])


@pytest.mark.feature("resuming within an epoch, bit-identical")
@pytest.mark.parametrize("layout", quick(TWO, "pp2"))
def test_the_same_layout_goes_on_bit_for_bit(ranks2: RankGroup, tmp_path: Path, layout: str):
    whole = ranks2.call(jobs.run, layout, str(tmp_path))
    for step in (3, jobs.STEPS_PER_EPOCH, 7):  # in the first epoch, between the two, and in the second
        resumed = ranks2.call(jobs.run, layout, ckpt_path=str(tmp_path / f"step={step}.ckpt"))
        assert_goes_on(resumed, whole, step)


@pytest.mark.feature("resuming within an epoch, bit-identical")
@pytest.mark.slow
@pytest.mark.parametrize("layout", FOUR)
def test_the_same_product_goes_on_bit_for_bit(ranks4: RankGroup, tmp_path: Path, layout: str):
    whole = ranks4.call(jobs.run, layout, str(tmp_path))
    assert_goes_on(ranks4.call(jobs.run, layout, ckpt_path=str(tmp_path / "step=3.ckpt")), whole, 3)


@pytest.mark.slow
def test_with_workers_that_prefetch(ranks2: RankGroup, tmp_path: Path):
    whole = ranks2.call(jobs.run, "dp2", str(tmp_path), workers=2)
    assert whole[0]["losses"] == ranks2.call(jobs.run, "dp2")[0]["losses"]
    assert_goes_on(ranks2.call(jobs.run, "dp2", ckpt_path=str(tmp_path / "step=3.ckpt"), workers=2), whole, 3)


def test_from_one_layout_and_world_size_to_others(ranks2: RankGroup, ranks4: RankGroup, tmp_path: Path):
    """dp4 for 3 steps, tp2-pp2 for 4 more, dp2 for the rest: the losses of one process all along."""
    expected = reference(jobs.run, None, dropout=0.0)
    first = ranks4.call(jobs.run, "dp4", str(tmp_path / "a"), dropout=0.0, max_steps=3)[0]
    second = ranks4.call(
        jobs.run,
        "tp2-pp2",
        str(tmp_path / "b"),
        ckpt_path=str(tmp_path / "a" / "step=3.ckpt"),
        dropout=0.0,
        max_steps=7,
    )[0]
    third = ranks2.call(jobs.run, "dp2", ckpt_path=str(tmp_path / "b" / "step=7.ckpt"), dropout=0.0)[0]
    losses = first["losses"] | second["losses"] | third["losses"]
    assert list(losses) == list(range(1, LAST + 1))
    assert losses == pytest.approx(expected["losses"], rel=1e-6)
    assert second["seen"] == 7
    for name, value in expected["weights"].items():
        torch.testing.assert_close(third["weights"][name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.feature("resuming from another layout, with the same losses")
@pytest.mark.parametrize(
    ("saved", "layout"), [("fsdp2", "pp2"), slow("pp2", "tp2"), slow("tp2", "fsdp2"), slow("tp2", "dp2")]
)
def test_to_another_layout_in_mid_epoch(ranks2: RankGroup, tmp_path: Path, saved: str, layout: str):
    whole = ranks2.call(jobs.run, saved, str(tmp_path), dropout=0.0, every=3)[0]
    again = ranks2.call(jobs.run, layout, ckpt_path=str(tmp_path / "step=3.ckpt"), dropout=0.0)[0]
    assert again["losses"] == pytest.approx({s: whole["losses"][s] for s in range(4, LAST + 1)}, rel=1e-6)


@pytest.mark.feature("checkpoints: consolidated into one plain file")
@pytest.mark.parametrize("layout", [slow("fsdp2"), slow("tp2"), "pp2"])
def test_one_plain_file(ranks2: RankGroup, tmp_path: Path, layout: str):
    """What Lightning loads in one process, goes on from there, and what any program reads."""
    whole = ranks2.call(jobs.run, layout, str(tmp_path), dropout=0.0, every=3)[0]
    path = tmp_path / "step=3.ckpt"
    consolidate(path, tmp_path / "plain.ckpt")
    consolidate(path, tmp_path / "weights.safetensors")
    module = jobs.Net.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert module.hparams["dropout"] == 0.0
    tensors = load_file(tmp_path / "weights.safetensors")
    state = module.state_dict()
    assert list(torch.load(tmp_path / "plain.ckpt")["state_dict"]) == list(state)
    assert all(torch.equal(tensors[name], value) for name, value in state.items())
    end = ranks2.call(jobs.run, layout, dropout=0.0, max_steps=3)[0]
    assert all(torch.equal(end["weights"][name], value) for name, value in state.items())
    # the one-process optimizer state is that of one process, too
    expected = jobs.run(None, str(tmp_path / "one"), dropout=0.0, every=3)
    ours = torch.load(tmp_path / "plain.ckpt")["optimizer_states"][0]
    theirs = torch.load(tmp_path / "one" / "step=3.ckpt", weights_only=False)["optimizer_states"][0]
    assert ours["param_groups"] == theirs["param_groups"]
    for number, entry in theirs["state"].items():
        for key, value in entry.items():
            torch.testing.assert_close(ours["state"][number][key], value, rtol=1e-4, atol=1e-7)
    assert whole["losses"] == pytest.approx(expected["losses"], rel=1e-5)


@pytest.mark.feature("checkpoints: resuming from a plain Lightning file")
@pytest.mark.parametrize("layout", [slow("fsdp2"), "pp2"])
def test_a_plain_file_of_lightning_is_a_starting_point(ranks2: RankGroup, tmp_path: Path, layout: str):
    whole = jobs.run(None, str(tmp_path), dropout=0.0, every=jobs.STEPS_PER_EPOCH, shuffle=False)
    path = tmp_path / f"step={jobs.STEPS_PER_EPOCH}.ckpt"
    assert path.is_file()
    again = ranks2.call(jobs.run, layout, ckpt_path=str(path), dropout=0.0, shuffle=False)[0]
    steps = range(jobs.STEPS_PER_EPOCH + 1, LAST + 1)
    assert again["losses"] == pytest.approx({s: whole["losses"][s] for s in steps}, rel=1e-5)


@pytest.mark.feature("`on_save_checkpoint` and `on_load_checkpoint`")
@pytest.mark.parametrize("layout", [slow("fsdp2"), "pp2"])
def test_hooks_change_what_is_saved_and_loaded(ranks2: RankGroup, tmp_path: Path, layout: str):
    ranks2.call(jobs.run, layout, str(tmp_path), kind="Hooks", every=5, max_epochs=1)
    saved = SavedCheckpoint(tmp_path / "step=5.ckpt")
    assert not any(name.startswith("stem.") for name in saved.groups["state_dict"])
    results = ranks2.call(
        jobs.run, layout, ckpt_path=str(tmp_path / "step=5.ckpt"), kind="Hooks", max_epochs=1, max_steps=5
    )
    for result in results:
        assert result["found"]["text"] == "kept"
        assert torch.equal(result["found"]["tensor"], torch.arange(3))
    assert torch.equal(results[0]["weights"]["stem.weight"], torch.full((16, 16), 0.5))
    assert torch.equal(results[0]["weights"]["norm.bias"], torch.full((16,), 0.25))


@pytest.mark.feature("checkpoints: sharded, each element written once")
@pytest.mark.parametrize("layout", ["dp2", "fsdp2", "tp2", "pp2"])
def test_every_element_is_written_once(ranks2: RankGroup, tmp_path: Path, layout: str):
    """No rank writes what another one writes; replicas share the work."""
    ranks2.call(jobs.run, layout, str(tmp_path), every=5, max_epochs=1)
    saved = SavedCheckpoint(tmp_path / "step=5.ckpt")
    for members in saved.groups.values():
        for tensor in members.values():
            tensor.read()  # refuses what is not covered exactly once
    sizes = [saved.files[f"rank-0000{r}.safetensors"]["bytes"] for r in range(2)]
    assert max(sizes) < 0.75 * sum(sizes), sizes


def test_asynchronous_saves_are_complete_and_as_good(ranks2: RankGroup, tmp_path: Path):
    whole = ranks2.call(jobs.run, "fsdp2", str(tmp_path), checkpoints={"asynchronous": True})
    assert jobs.files(tmp_path) == sorted(f"step={s}.ckpt" for s in range(1, LAST + 1))
    assert all(SavedCheckpoint(p).problems() == [] for p in tmp_path.iterdir())
    assert_goes_on(ranks2.call(jobs.run, "fsdp2", ckpt_path=str(tmp_path / "step=4.ckpt")), whole, 4)


@pytest.mark.parametrize(
    ("keep", "left", "asynchronous"),
    [(3, [8, 9, 10], True), slow(1, [10], False), slow(1, [10], True), slow(3, [8, 9, 10], False)],
)
def test_the_newest_are_kept(ranks2: RankGroup, tmp_path: Path, asynchronous: bool, keep: int, left: list[int]):
    """ModelCheckpoint(save_top_k=1) removes the older ones; `keep` decides how many stay."""
    options: dict[str, Any] = {"asynchronous": asynchronous, "keep": keep}
    ranks2.call(jobs.run, "dp2", str(tmp_path), keep=1, checkpoints=options)
    assert jobs.files(tmp_path) == sorted(f"step={s}.ckpt" for s in left)


def test_a_damaged_checkpoint_is_refused_by_all_ranks(ranks2: RankGroup, tmp_path: Path):
    ranks2.call(jobs.run, "pp2", str(tmp_path), every=5, max_epochs=1)
    file = tmp_path / "step=5.ckpt" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 4
    file.write_bytes(data)
    with pytest.raises(RankError, match=r"CheckpointError: .*rank-00001.safetensors \(rank 1\) is damaged"):
        ranks2.call(jobs.run, "pp2", ckpt_path=str(tmp_path / "step=5.ckpt"))


@pytest.mark.feature('`ckpt_path="last"` falls back to the newest intact checkpoint')
@pytest.mark.parametrize("layout", [slow("fsdp2"), "pp2"])
def test_last_is_the_newest_that_is_intact(ranks2: RankGroup, tmp_path: Path, layout: str):
    whole = ranks2.call(jobs.run, layout, str(tmp_path))
    for step in (LAST, LAST - 1):
        file = tmp_path / f"step={step}.ckpt" / "rank-00001.json"
        file.write_bytes(file.read_bytes()[:-40])
    shutil.rmtree(tmp_path / f"step={LAST - 2}.ckpt")
    (tmp_path / f"step={LAST - 3}.ckpt" / "manifest.json").write_text("{}")
    resumed = ranks2.call(jobs.run, layout, str(tmp_path), ckpt_path="last", every=100)
    assert_goes_on(resumed, whole, LAST - 4)
    said = resumed[0]["warnings"]
    assert re.search(rf"step={LAST}.ckpt/rank-00001.json \(rank 1\) has .* cut off", said), said
    assert f"Resuming from {tmp_path}/step={LAST - 4}.ckpt instead" in said
    assert f"step={LAST - 3}.ckpt is skipped: its manifest is damaged" in said


def test_last_where_all_are_damaged_does_not_start_anew(ranks2: RankGroup, tmp_path: Path):
    ranks2.call(jobs.run, "dp2", str(tmp_path), every=5)
    for path in tmp_path.iterdir():
        (path / "rank-00000.safetensors").unlink()
    with pytest.raises(RankError, match=r"step=10.ckpt/rank-00000.safetensors \(rank 0\) is missing"):
        ranks2.call(jobs.run, "dp2", str(tmp_path), ckpt_path="last")


def test_last_where_there_is_none_starts_as_lightning_does(ranks2: RankGroup, tmp_path: Path):
    result = ranks2.call(jobs.run, "dp2", str(tmp_path), ckpt_path="last", every=100)[0]
    assert list(result["losses"]) == list(range(1, LAST + 1))
    assert "no last checkpoint available" in result["warnings"]


def test_another_model_is_refused(ranks2: RankGroup, tmp_path: Path):
    ranks2.call(jobs.run, "fsdp2", str(tmp_path), kind="Hooks", every=5, max_epochs=1)
    with pytest.raises(RankError, match=r"missing keys \['stem.bias', 'stem.weight'\]"):
        ranks2.call(jobs.run, "fsdp2", ckpt_path=str(tmp_path / "step=5.ckpt"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few checkpoints."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(tmp_path)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        pytest.skip(f"mounting a small file system needs more rights than this process has: {made.stderr.strip()}")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@pytest.mark.parametrize("asynchronous", [slow(False), True])
def test_a_full_disk_costs_the_new_checkpoint_only(ranks2: RankGroup, small_disk: Path, asynchronous: bool):
    expected = ranks2.call(jobs.run, "fsdp2")[0]
    result = ranks2.call(jobs.run, "fsdp2", str(small_disk), checkpoints={"asynchronous": asynchronous})[0]
    assert result["losses"] == expected["losses"], "training went on"
    left = jobs.files(small_disk)
    assert 1 <= len(left) < LAST
    assert left == sorted(f"step={s}.ckpt" for s in range(1, len(left) + 1)), "nothing half written"
    assert all(SavedCheckpoint(p).problems() == [] for p in small_disk.iterdir())


def test_a_full_disk_ends_the_run_where_that_is_wanted(ranks2: RankGroup, small_disk: Path):
    with pytest.raises(
        RankError, match=r"CheckpointError: Saving .* failed, earlier checkpoints are untouched.*Rank \d"
    ):
        ranks2.call(jobs.run, "fsdp2", str(small_disk), checkpoints={"on_error": "raise"})
    assert all(SavedCheckpoint(p).problems() == [] for p in small_disk.iterdir())


def test_a_full_disk_keeps_the_last_good_one(ranks2: RankGroup, small_disk: Path):
    """ModelCheckpoint(save_top_k=1) asks for the removal of the one before, though the new one could not be saved."""
    ranks2.call(jobs.run, "fsdp2", str(small_disk / "one"), max_steps=1)
    size = sum(f.stat().st_blocks * 512 for f in (small_disk / "one" / "step=1.ckpt").iterdir())
    shutil.rmtree(small_disk / "one")
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - size * 3 // 2))  # leaves room for one
    ranks2.call(jobs.run, "fsdp2", str(small_disk), keep=1)
    filler.unlink()
    assert jobs.files(small_disk) == ["step=1.ckpt"], "every later one has failed"
    assert SavedCheckpoint(small_disk / "step=1.ckpt").problems() == []
