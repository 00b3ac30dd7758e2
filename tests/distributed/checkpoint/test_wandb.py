"""Checkpoints in Weights & Biases: artifacts of folders, and one run before and after resuming; read back offline."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests import wandb_files
from tests.distributed.checkpoint import wandb_jobs as jobs
from tests.harness import RankGroup
from tests.pairwise import quick


def facts(artifact: Any) -> dict[str, Any]:
    """The metadata of an artifact."""
    return json.loads(artifact.metadata)


def no_key(folder: Path) -> None:
    """Shows that no file has the key of W&B."""
    seen = [path for path in folder.rglob("*") if path.is_file()]
    assert len(seen) > 5
    assert [path for path in seen if jobs.KEY.encode() in path.read_bytes()] == []


@pytest.mark.parametrize("layout", quick(["dp2", "fsdp2", "tp2", "pp2"], "pp2"))
def test_the_last_checkpoint_is_uploaded_and_its_run_continued(ranks2: RankGroup, tmp_path: Path, layout: str) -> None:
    first, nothing = ranks2.call(jobs.fit, layout, tmp_path, 4)
    assert first is not None
    assert nothing is None, "only rank 0 has a run"
    (path,) = wandb_files.files(tmp_path)
    (artifact,) = wandb_files.artifacts(path)
    (folder,) = (tmp_path / "saved").glob("*step=4.ckpt")
    manifest = folder / "manifest.json"
    assert artifact.name == f"model-{first}"
    assert set(artifact.aliases) == {"latest", "best"}
    assert facts(artifact)["layout"] == layout
    assert facts(artifact)["step"] == 4
    assert facts(artifact)["manifest_sha256"] == hashlib.sha256(manifest.read_bytes()).hexdigest()
    assert facts(artifact)["original_filename"] == folder.name
    assert {c.path: c.size for c in artifact.manifest.contents} == {
        file.name: file.stat().st_size for file in folder.iterdir()
    }
    again, _ = ranks2.call(jobs.fit, layout, tmp_path, 6, last=True)
    assert again == first, "the run goes on"
    assert [p.name for p in wandb_files.files(tmp_path)] == [f"run-{first}.wandb"] * 2
    other, _ = ranks2.call(jobs.fit, layout, tmp_path, 6)
    assert other != first, "a run from the start is another one"
    no_key(tmp_path)


@pytest.mark.slow
def test_every_checkpoint_is_uploaded_once(ranks2: RankGroup, tmp_path: Path) -> None:
    """Also those that a thread writes while training goes on."""
    saves = {"save_top_k": -1, "filename": "{step}"}
    ranks2.call(jobs.fit, "dp2", tmp_path, 6, log_model="all", options={"asynchronous": True}, saves=saves)
    (path,) = wandb_files.files(tmp_path)
    uploaded = wandb_files.artifacts(path)
    assert [facts(artifact)["step"] for artifact in uploaded] == [2, 4, 6]


@pytest.mark.slow
def test_a_large_checkpoint_is_a_reference(ranks2: RankGroup, tmp_path: Path) -> None:
    ranks2.call(jobs.fit, "dp2", tmp_path, 2, options={"reference_bytes": 1000})
    (path,) = wandb_files.files(tmp_path)
    (artifact,) = wandb_files.artifacts(path)
    (folder,) = (tmp_path / "saved").glob("*.ckpt")
    entries = {c.path: c.ref for c in artifact.manifest.contents}
    assert entries.pop("manifest.json") == "", "this file is uploaded"
    assert {path: ref for path, ref in entries.items() if not ref.startswith(folder.as_uri())} == {}
    assert {Path(path).name for path in entries} == {file.name for file in folder.iterdir()}


@pytest.mark.slow
def test_without_log_model_nothing_is_uploaded(ranks2: RankGroup, tmp_path: Path) -> None:
    ranks2.call(jobs.fit, "dp2", tmp_path, 2, log_model=False)
    (path,) = wandb_files.files(tmp_path)
    assert wandb_files.artifacts(path) == []
