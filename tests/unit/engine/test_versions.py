"""A torch newer than the tested ones gives one warning that names them; any other gives none."""

import warnings

import pytest
import torch

from lightning_hybrid._torch_private import warn_if_untested


def test_a_newer_release_is_warned_of_once_by_name(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "99.1.0")
    with pytest.warns(UserWarning, match=r"tested with torch 2\.13; this is torch 99\.1\.0") as record:
        warn_if_untested()
    assert len(record) == 1


@pytest.mark.parametrize("version", ["2.13.0+cpu", "2.11.0"])
def test_other_releases_are_not_warned_of(monkeypatch, version):
    monkeypatch.setattr(torch, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested()
