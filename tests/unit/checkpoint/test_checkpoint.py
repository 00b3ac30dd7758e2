"""Checkpoints on disk: any part from any parts; complete or not there; checked before use, and no code in them runs."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pickle
import random
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore  # type: ignore[attr-defined]

from lightning_hybrid.checkpoint import content as content_module
from lightning_hybrid.checkpoint.consolidate import consolidate, verify
from lightning_hybrid.checkpoint.content import Content, Part, RankFiles
from lightning_hybrid.checkpoint.files import MANIFEST, candidates, staged
from lightning_hybrid.checkpoint.manifest import WritingRanks, write_checkpoint, write_manifest
from lightning_hybrid.checkpoint.options import CheckpointOptions
from lightning_hybrid.checkpoint.plain import decode, encode
from lightning_hybrid.checkpoint.reader import SavedCheckpoint, newest_first
from lightning_hybrid.spec.errors import CheckpointError
from lightning_hybrid.spec.tensor_index import overlaps, runs_of, shape_of, whole_index

ABOUT = {"step": 5, "epoch": 1, "layout": "dp1", "seconds": 0.0}


# ---- parts of tensors


def test_runs():
    assert runs_of([4, 5, 6, 0, 1]) == ((4, 7), (0, 2))
    assert runs_of(range(3, 6)) == ((3, 6),)
    assert runs_of([]) == runs_of(range(0)) == ()
    assert shape_of((((0, 4),), ((8, 12), (0, 4)))) == (4, 8)
    assert whole_index((3, 0)) == (((0, 3),), ())


@pytest.mark.parametrize("seed", range(20))
def test_any_part_is_filled_from_any_other_parts(seed):
    draw = random.Random(seed)
    shape = tuple(draw.randint(1, 7) for _ in range(draw.randint(0, 3)))
    whole = torch.arange(float(torch.Size(shape).numel())).view(shape)

    def division(count: int) -> list[tuple]:
        """A division of the tensor into parts along one dim, in a random order of its indices."""
        if not shape:
            return [()]
        dim = draw.randrange(len(shape))
        order = draw.sample(range(shape[dim]), shape[dim])
        step = -(-shape[dim] // count)
        parts = [runs_of(order[i : i + step]) for i in range(0, shape[dim], step)]
        return [tuple(p if d == dim else r for d, r in enumerate(whole_index(shape))) for p in parts]

    def taken(index: tuple) -> torch.Tensor:
        part = whole
        for dim, runs in enumerate(index):
            part = part.index_select(dim, torch.tensor([i for a, b in runs for i in range(a, b)]))
        return part

    stored = [(index, taken(index)) for index in division(3)]
    for target in division(2):
        out = torch.full(shape_of(target), -1.0)
        for index, tensor in stored:
            for box in overlaps(target, index):
                out[box.target] = tensor[box.source]
        assert torch.equal(out, taken(target))


# ---- state as plain data


def _round_trip(value: Any, trust: bool = False) -> Any:
    tensors: dict[str, torch.Tensor] = {}

    def put(tensor: torch.Tensor) -> str:
        tensors[str(len(tensors))] = tensor
        return str(len(tensors) - 1)

    return decode(json.loads(json.dumps(encode(value, put))), tensors.__getitem__, trust, "FILE")


def test_state_comes_back_with_its_types():
    state = {
        "plain": [1, 2.5, "text", None, True],
        "tuple": (1, (2, 3)),
        "numbers": {1: "a", (2, 3): "b", "$odd": 4},
        "float": [float("inf"), float("-inf")],
        "set": {1, 2},
        "ordered": OrderedDict([("b", 1), ("a", 2)]),
        "path": Path("a/b"),
        "bytes": b"\0\1",
        "time": datetime.timedelta(days=1, microseconds=3),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "namespace": argparse.Namespace(x=1),
        "range": range(1, 9, 2),
        "numpy": np.float32(1.5),
        "random": random.Random(3).getstate(),
    }
    result = _round_trip(state)
    assert result == state
    assert list(result["ordered"]) == ["b", "a"]
    assert type(result["ordered"]) is OrderedDict
    assert type(result["numpy"]) is np.float32
    assert np.isnan(_round_trip(float("nan")))


def test_tensors_and_arrays_come_back():
    keys = np.random.default_rng(0).integers(0, 2**32, 624, dtype=np.uint32)
    state = _round_trip({"t": torch.arange(3), "keys": ("MT19937", keys, 5)})
    assert torch.equal(state["t"], torch.arange(3))
    assert state["keys"][1].dtype == np.uint32
    assert (state["keys"][1] == keys).all()


class Exploding:
    """Says so when it is unpickled."""

    ran = False

    def __reduce__(self):
        return _explode, ()


def _explode() -> str:
    Exploding.ran = True
    return "boom"


def test_a_pickle_is_run_only_where_the_file_is_trusted():
    Exploding.ran = False
    with pytest.raises(CheckpointError, match=r"FILE holds a pickled .*Exploding \(at `.a\[0\]`\).*trust_pickle=True"):
        _round_trip({"a": [Exploding()]})
    assert not Exploding.ran
    assert _round_trip({"a": [Exploding()]}, trust=True) == {"a": ["boom"]}
    assert Exploding.ran


def test_what_cannot_be_saved_is_left_out_and_said():
    with pytest.warns(UserWarning, match=r"leaves out `.f`.*cannot be pickled"):
        assert _round_trip({"f": lambda: 0, "g": 1}) == {"f": None, "g": 1}


def test_an_unknown_form_is_refused():
    with pytest.raises(CheckpointError, match=r"unknown form '\$import'"):
        decode({"$import": "os"}, {}.__getitem__, True, "FILE")
    with pytest.raises(CheckpointError, match="'load' as a torch.dtype"):
        decode({"$torch": "load", "kind": "dtype"}, {}.__getitem__, True, "FILE")


# ---- a checkpoint of three ranks


def _contents(step: int) -> list[Content]:
    """Row-sharded `w`, `b` on rank 1, some state."""
    whole = torch.arange(18.0).view(6, 3) + step
    contents = []
    for rank in range(3):
        rows = (2 * rank, 2 * rank + 2)
        parts = [
            Part(
                group="state_dict",
                name="w",
                shape=(6, 3),
                index=((rows,), ((0, 3),)),
                tensor=whole[rows[0] : rows[1]],
            )
        ]
        if rank == 1:
            parts.append(
                Part(group="state_dict", name="b", shape=(), index=(), tensor=torch.tensor(7, dtype=torch.bfloat16))
            )
        document = {"streams": rank}
        if rank == 0:
            document |= {"names": ["b", "w", "w2"], "aliases": {"w2": "w"}, "epoch": 1, "global_step": step}
        contents.append(
            Content(parts=parts, values={"state_dict": {"extra": 3}} if rank == 2 else {}, document=document)
        )
    return contents


def _save(path: Path, step: int = 5, store: Any = None, number: int = 1) -> list[str]:
    """Writes with three threads for ranks; returns what each raised."""
    store = HashStore() if store is None else store
    errors = [""] * 3

    def write(rank: int, content: Content) -> None:
        ranks = WritingRanks(store=store, rank=rank, world_size=3, timeout=datetime.timedelta(seconds=10))
        try:
            write_checkpoint(ranks, number, path, RankFiles.of(content), {**ABOUT, "step": step}, lambda: None)
        except CheckpointError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=write, args=(r, c)) for r, c in enumerate(_contents(step))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "step=5.ckpt"
    assert _save(path) == ["", "", ""]
    return path


def test_what_was_written_is_read(path):
    saved = SavedCheckpoint(path)
    assert saved.problems() == []
    assert (saved.step, saved.world_size) == (5, 3)
    assert torch.equal(saved.groups["state_dict"]["w"].read(), torch.arange(18.0).view(6, 3) + 5)
    middle = saved.groups["state_dict"]["w"].read((((1, 5),), ((2, 3), (0, 1))))
    assert torch.equal(middle, (torch.arange(18.0).view(6, 3) + 5)[1:5, [2, 0]])
    nothing = saved.groups["state_dict"]["w"].read(((), ((0, 3),)))  # of a rank without a shard
    assert nothing.shape == (0, 3)
    assert saved.groups["state_dict"]["b"].read() == 7
    assert saved.groups["state_dict"]["b"].dtype == torch.bfloat16
    assert saved.values["state_dict"] == {"extra": 3}
    assert saved.document(2) == {"streams": 2}
    assert not staged(path).exists()


def test_one_plain_file_of_it(path, tmp_path):
    consolidate(path, tmp_path / "one.ckpt")
    one = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert list(one["state_dict"]) == ["b", "w", "w2", "extra"]
    assert torch.equal(one["state_dict"]["w2"], torch.arange(18.0).view(6, 3) + 5)
    assert one["epoch"] == 1
    consolidate(path, tmp_path / "one.safetensors")
    tensors = load_file(tmp_path / "one.safetensors")
    assert set(tensors) == {"b", "w", "w2"}
    assert torch.equal(tensors["w"], one["state_dict"]["w"])
    with pytest.raises(CheckpointError, match="`out` must not exist"):
        consolidate(path, tmp_path / "one.ckpt")
    assert "is intact: step 5, epoch 1, layout dp1, 3 ranks" in verify(path)


FILES = [f"rank-0000{r}.{s}" for r in range(3) for s in ("json", "safetensors")]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_found(path, name):
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    (problem,) = SavedCheckpoint(path).problems()
    assert f"{name} (rank {name[9]}) is damaged" in problem
    with pytest.raises(CheckpointError, match=rf"{name} \(rank"):
        verify(path)
    with pytest.raises(CheckpointError, match=rf"{name} \(rank"):
        consolidate(path, path.parent / "out.ckpt")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_found(path, name):
    os.truncate(path / name, 20)
    (problem,) = SavedCheckpoint(path).problems()
    assert f"{name} (rank {name[9]}) has 20 bytes instead of" in problem
    (path / name).unlink()
    (problem,) = SavedCheckpoint(path).problems()
    assert f"{name} (rank {name[9]}) is missing" in problem


def test_files_of_two_checkpoints_are_not_mixed(path, tmp_path):
    other = tmp_path / "step=6.ckpt"
    _save(other, 6)
    for name in ("rank-00001.json", "rank-00001.safetensors"):
        (path / name).write_bytes((other / name).read_bytes())
    assert any("rank-00001.safetensors (rank 1) is damaged" in p for p in SavedCheckpoint(path).problems())


@pytest.mark.parametrize("position", [0.2, 0.5, 0.8])
def test_a_damaged_manifest_is_refused(path, position):
    text = (path / MANIFEST).read_text()
    i = int(len(text) * position)
    changed = text[:i] + ("7" if text[i] != "7" else "8") + text[i + 1 :]
    (path / MANIFEST).write_text(changed)
    with pytest.raises(CheckpointError, match="manifest.json"):
        SavedCheckpoint(path)


def test_a_manifest_that_leads_out_of_its_folder_is_refused(path):
    content = json.loads((path / MANIFEST).read_text())["content"]
    content["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": ""}
    write_manifest(path, content)
    with pytest.raises(CheckpointError, match="does not list the files of 3 ranks"):
        SavedCheckpoint(path)
    content["files"] = {"../a": {"bytes": 1, "sha256": ""}}
    content["world_size"] = 0
    write_manifest(path, content)
    with pytest.raises(CheckpointError, match="does not list the files of"):
        SavedCheckpoint(path)


def test_a_rank_file_that_lies_about_its_tensors_is_refused(path):
    """Even where the hashes fit, as an attacker can make them."""
    file = path / "rank-00002.safetensors"
    tensors = load_file(file)
    save_file({k: torch.zeros(9, 9) for k in tensors}, file)
    with pytest.raises(CheckpointError, match=r"rank-00002.safetensors \(rank 2\): the part of `w` has shape \(9, 9\)"):
        SavedCheckpoint(path).groups["state_dict"]["w"].read()
    file.write_bytes(pickle.dumps(Exploding()))
    Exploding.ran = False
    with pytest.raises(CheckpointError, match=r"rank-00002.safetensors \(rank 2\) cannot be read"):
        SavedCheckpoint(path).groups["state_dict"]["w"].read()
    assert not Exploding.ran


def test_a_part_that_is_missing_is_found(path):
    index = json.loads((path / "rank-00001.json").read_text())
    del index["tensors"]["state_dict"]["w"]
    (path / "rank-00001.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="has 12 of the requested elements of `w`"):
        SavedCheckpoint(path).groups["state_dict"]["w"].read()


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        SavedCheckpoint(tmp_path / "none.ckpt")
    with pytest.raises(CheckpointError, match="was interrupted"):
        SavedCheckpoint(tmp_path)


# ---- writing that fails


def test_a_disk_that_is_full_leaves_what_was_there(path, monkeypatch):
    def full(tensors: dict, file: Path) -> None:
        if "rank-00002" in str(file):
            raise OSError(28, "No space left on device")
        save_file(tensors, file)

    monkeypatch.setattr(content_module, "save_file", full)
    errors = _save(path, 6)
    assert all("Rank 2: OSError: [Errno 28] No space left on device" in e for e in errors), errors
    assert SavedCheckpoint(path).step == 5
    assert SavedCheckpoint(path).problems() == []
    assert list(path.parent.iterdir()) == [path]


def test_overwriting_exchanges_only_when_the_new_one_is_complete(path):
    assert _save(path, 6) == ["", "", ""]
    assert SavedCheckpoint(path).step == 6
    assert list(path.parent.iterdir()) == [path]


def test_a_run_killed_between_the_renames_has_both(path, monkeypatch):
    def rename(source: Path, target: Path) -> None:
        if source == staged(path):
            raise KeyboardInterrupt  # as good as a kill: nothing after this runs
        os.replace(source, target)

    monkeypatch.setattr("lightning_hybrid.checkpoint.files.os.rename", rename)
    store = HashStore()
    ranks = WritingRanks(store=store, rank=0, world_size=1, timeout=datetime.timedelta(seconds=10))
    files = RankFiles.of(Content(document={}))
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(ranks, 1, path, files, {**ABOUT, "step": 6}, lambda: None)
    assert not path.exists()
    assert [SavedCheckpoint(p).step for p in newest_first(list(candidates(path.parent)))] == [6, 5]


def test_a_rank_that_does_not_answer_ends_the_save(tmp_path):
    ranks = WritingRanks(store=HashStore(), rank=0, world_size=2, timeout=datetime.timedelta(seconds=0.5))
    with pytest.raises(CheckpointError, match="another rank did not answer"):
        write_checkpoint(ranks, 1, tmp_path / "a.ckpt", RankFiles.of(Content()), dict(ABOUT), lambda: None)
    assert newest_first(list(candidates(tmp_path))) == []


def test_leftovers_of_a_killed_run_are_no_checkpoint_and_do_not_disturb(tmp_path):
    path = tmp_path / "step=5.ckpt"
    staged(path).mkdir()
    (staged(path) / "rank-00000.safetensors").write_bytes(b"half")
    assert list(candidates(tmp_path)) == []
    assert _save(path) == ["", "", ""]
    assert SavedCheckpoint(path).problems() == []


def test_changes_after_the_copy_do_not_matter():
    weight = torch.ones(4)
    state = {"list": [1]}
    part = Part(group="g", name="w", shape=(4,), index=((((0, 4)),),), tensor=weight)
    files = RankFiles.of(Content(parts=[part], document=state)).on_host()
    weight.zero_()
    state["list"].append(2)
    assert torch.equal(files.tensors["0"], torch.ones(4))
    assert files.index["document"] == {"list": [1]}


@pytest.mark.parametrize(
    ("options", "match"),
    [({"keep": 0}, r"`keep` must be .* Got 0"), ({"on_error": "ignore"}, r"`on_error` must be 'warn' or 'raise'")],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        CheckpointOptions(**options)
