"""Old names of public arguments: accepted with a warning, from code and from configuration files."""

from dataclasses import asdict
from typing import Any

import pytest
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import Callback

from lightning_hybrid.adapt.batch_size import BatchSizeState
from lightning_hybrid.callbacks import AdaptiveBatchSize, Phase


def test_the_old_name_sets_the_new_one() -> None:
    old: dict[str, Any] = {"micro_batch_size": 3}
    with pytest.warns(DeprecationWarning, match="`micro_batch_size` of `Phase` is now named `microbatch_size`"):
        assert Phase(at_step=1, **old) == Phase(at_step=1, microbatch_size=3)
    with pytest.raises(TypeError, match="`Phase` got `microbatch_size` and `micro_batch_size`"):
        Phase(microbatch_size=3, **old)


def test_the_old_name_in_a_configuration() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--callback", type=Callback)
    text = '{"class_path": "lightning_hybrid.callbacks.AdaptiveBatchSize", "init_args": {"max_micro_batch_size": %s}}'
    with pytest.warns(DeprecationWarning, match="is now named `max_microbatch_size`"):
        callback = parser.instantiate(parser.parse_args([f"--callback={text % 4}"])).callback
    assert callback._microbatch._most == 4  # noqa: SLF001
    with pytest.raises(Exception, match="Expected a <class 'int'>"):
        parser.parse_args([f"--callback={text % '[]'}"])


@pytest.mark.parametrize("name", ["microbatch_size", "micro_batch_size"])
def test_a_checkpoint_with_either_name_loads(name: str) -> None:
    state = asdict(BatchSizeState(batch_size=8, first_batch_size=8))
    saved = {"state": state, "noise": {}, "times": {}, "measured_on": "", name: 2, "events": []}
    callback = AdaptiveBatchSize()
    callback.load_state_dict(saved)
    assert callback.state_dict()["microbatch_size"] == 2
