"""The cells of a notebook. `test_notebook.py` runs them in Jupyter, and those that are not slow in one process."""

# %%
import os
import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_hybrid import HybridStrategy
from lightning_hybrid.spec.errors import PartitionError, RankError

torch.manual_seed(0)
x = torch.randn(32, 8)
data = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)


def layers() -> torch.nn.Module:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = torch.nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", torch.nn.functional.mse_loss(self(batch[0]), batch[1]))

    def predict_step(self, batch: Any, index: int) -> torch.Tensor:
        return self(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(layout: str, devices: int = 2, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"max_epochs": 2, "enable_checkpointing": "callbacks" in options} | quiet | options
    return L.Trainer(accelerator="cpu", devices=devices, strategy=HybridStrategy(layout), **options)


# %% one rank and several, in the same notebook
one, several = Model(), Model()
alone = trainer("dp1", devices=1)
alone.fit(one, data, data)
checkpoints = ModelCheckpoint("checkpoints", monitor="val_loss")
together = trainer("pp2", callbacks=[checkpoints])
together.fit(several, data, data)
for name, weight in one.state_dict().items():
    torch.testing.assert_close(several.state_dict()[name], weight)
    assert not torch.equal(weight, Model().state_dict()[name])
torch.testing.assert_close(dict(together.callback_metrics), dict(alone.callback_metrics))
assert (together.global_step, together.current_epoch) == (8, 2)
assert together.state.finished
assert os.path.isdir(checkpoints.best_model_path)
assert "LOCAL_RANK" not in os.environ

# %% slow: evaluation of the trained module
torch.testing.assert_close(together.validate(several, data), alone.validate(one, data))
torch.testing.assert_close(together.predict(several, data), alone.predict(one, data))


# %% slow: a module whose weights are made in the ranks
class Configured(Model):
    def __init__(self) -> None:
        L.LightningModule.__init__(self)
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = layers()


configured = Configured()
trainer("tp2").fit(configured, data, data)
torch.testing.assert_close(configured(x), several(x))


# %% errors
class Own(Exception):
    def __init__(self, number: int, text: str) -> None:
        super().__init__(f"{number} {text}")


class Failing(Model):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def setup(self, stage: str) -> None:
        if self.how == "made in setup":
            self.more = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        if self.global_rank == 1 and index == 1:
            if self.how == "own":
                raise Own(3, "of its own")
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "raises":
                raise KeyError("of rank 1")
        return super().training_step(batch, index)


def error_of(model: L.LightningModule, layout: str = "dp2") -> tuple[Exception, str]:
    try:
        trainer(layout, callbacks=[OnExceptionCheckpoint("checkpoints")]).fit(model, data)
    except Exception as error:
        return error, str(error.__cause__)
    raise AssertionError("no error")


error, cause = error_of(Failing("raises"))
assert (type(error), error.args) == (KeyError, ("of rank 1",))
assert cause.startswith("Rank 1 of 2\nTraceback")
assert "in training_step" in cause

# %% slow: further errors
error, _ = error_of(Failing("own"))
assert (type(error), str(error)) == (RankError, "Rank 1 of 2 failed: Own: 3 of its own")
error, _ = error_of(Failing("killed"))
assert type(error) is RankError
assert "Rank 1 of 2 ended without a word" in str(error)
assert "SIGKILL" in str(error)
error, _ = error_of(Failing("made in setup"))
assert "The weights more.bias, more.weight were made in the ranks only" in str(error)
too_small = Model()
too_small.net = torch.nn.Linear(8, 1)
error, _ = error_of(too_small, "pp2")
assert type(error) is PartitionError


# %% what only the ranks could do, and ranks that a notebook cannot start
def refusal(function: Callable, *args: Any, **options: Any) -> str:
    try:
        function(*args, **options)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error)
    raise AssertionError("not refused")


assert "belongs into a callback (`ModelCheckpoint`)" in refusal(together.save_checkpoint, "whole.ckpt")
assert "creating a new Trainer" in refusal(together.fit, several, data)
assert "`num_nodes` must be 1 in a notebook" in refusal(trainer, "dp4", num_nodes=2)
os.environ["LOCAL_RANK"] = "0"
assert "expects another launcher to start the ranks" in refusal(trainer, "dp2")
del os.environ["LOCAL_RANK"]

# %% slow: after failures, with a checkpoint
more = trainer("fsdp2", max_epochs=3)
more.fit(several, data, data, ckpt_path=checkpoints.best_model_path)
assert more.current_epoch == 3
