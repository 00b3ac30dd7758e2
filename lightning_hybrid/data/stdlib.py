"""`StdlibText`: a data module over the sources of Python's standard library."""

from collections.abc import Sequence

from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_hybrid.data.global_batches import EpochOrder, share
from lightning_hybrid.data.text import ByteWindows, read_bytes, stdlib_modules, stdlib_sources

Batches = DataLoader[tuple[Tensor, Tensor]]

TABLES = ("encodings", "pydoc_data", "test")
"""Excluded from the training text: character maps, a file of help topics, and 17 MB of tests with generated data."""


class StdlibText(LightningDataModule):
    """Python's standard library as byte-level text, with packages held out for validation and test.

    A batch is a pair ``(tokens_BT, targets_BT)`` of bytes and the bytes that follow them. ``batch_size`` is that of the
    global batch; the data-parallel replicas of the Trainer's strategy share it. The global batches do not depend on the
    number of replicas.

    Args:
        batch_size: Windows in a global batch; a multiple of the number of data-parallel replicas.
        context_length: Bytes in a window, T.
        validation_modules: Top-level packages or modules held out for validation.
        test_modules: Top-level packages or modules held out for testing and prediction.
        evaluation_windows: Windows in the validation set and in the test set, evenly spaced over the held-out text and
            rounded down to whole global batches, so that every layout evaluates each window once.
        seed: Seed of the order of the training windows.
    """

    def __init__(
        self,
        batch_size: int = 32,
        context_length: int = 256,
        validation_modules: Sequence[str] = ("email", "logging", "statistics"),
        test_modules: Sequence[str] = ("http", "json", "textwrap"),
        evaluation_windows: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("context_length", context_length)):
            if type(value) is not int or value < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1. Got {value}.")
        if evaluation_windows < batch_size:
            raise ValueError(
                f"`evaluation_windows` must be at least `batch_size`, for one whole batch. "
                f"Got {evaluation_windows} with a batch size of {batch_size}."
            )
        self.batch_size = batch_size
        self.context_length = context_length
        self.validation_modules = tuple(validation_modules)
        self.test_modules = tuple(test_modules)
        self.evaluation_windows = evaluation_windows // batch_size * batch_size
        self.seed = seed
        self._training: ByteWindows | None = None
        self._validation: ByteWindows | None = None
        self._test: ByteWindows | None = None

    def setup(self, stage: str) -> None:
        """Read the text of a stage.

        Args:
            stage: ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.
        """
        if stage == "fit" and self._training is None:
            held_out = {*self.validation_modules, *self.test_modules, *TABLES}
            self._training = self._windows([name for name in stdlib_modules() if name not in held_out])
        if stage in ("fit", "validate") and self._validation is None:
            self._validation = self._windows(self.validation_modules, self.evaluation_windows)
        if stage in ("test", "predict") and self._test is None:
            self._test = self._windows(self.test_modules, self.evaluation_windows)

    def train_dataloader(self) -> Batches:
        """Return this replica's share of the training batches, in an order given by the seed and the epoch."""
        return self._loader(self._training, shuffle=True)

    def val_dataloader(self) -> Batches:
        """Return this replica's share of the validation batches."""
        return self._loader(self._validation, shuffle=False)

    def test_dataloader(self) -> Batches:
        """Return this replica's share of the test batches."""
        return self._loader(self._test, shuffle=False)

    def predict_dataloader(self) -> Batches:
        """Return this replica's share of the test batches."""
        return self._loader(self._test, shuffle=False)

    def _windows(self, modules: Sequence[str], limit: int | None = None) -> ByteWindows:
        return ByteWindows(read_bytes(stdlib_sources(modules)), self.context_length, limit)

    def _loader(self, windows: ByteWindows | None, *, shuffle: bool) -> Batches:
        if windows is None:
            raise RuntimeError("The data must be read before it is loaded. Call `setup` with the stage first.")
        batch_size = share(self.batch_size, "batch_size", self.trainer)
        # The strategy assigns windows r, r + n, ... of this order to replica r of n, so its k-th batch is a part of the
        # k-th global batch. The order is the same for all strategies; Lightning's samplers would shuffle differently.
        sampler = EpochOrder(len(windows), shuffle=shuffle, seed=self.seed)
        return DataLoader(windows, batch_size=batch_size, sampler=sampler, drop_last=True)
