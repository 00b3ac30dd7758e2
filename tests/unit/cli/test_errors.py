"""Wrong inputs: what a user sees last."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_hybrid.cli import main
from tests.pairwise import quick
from tests.unit.cli.test_training import CONFIG

HYBRID = "--trainer.strategy=lightning_hybrid.HybridStrategy"
USERS_MODULE = """
import lightning as L

class Net(L.LightningModule):
    def __init__(self, width: int = 3):
        super().__init__()
        if width == 3:
            raise ZeroDivisionError("of the user")

class Needs(Net):
    def __init__(self, depth: int, kind: str):
        super().__init__()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a good configuration, and modules of the user."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-hybrid"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    (tmp_path / "good.yaml").write_text(yaml.safe_dump(CONFIG))
    (tmp_path / "users_net.py").write_text(USERS_MODULE)
    (tmp_path / "half_done.py").write_text("import no_such_requirement")
    (tmp_path / "fails.py").write_text("x = 1\nraise RuntimeError('at its import')")
    (tmp_path / "list.yaml").write_text("- a")
    (tmp_path / "syntax.yaml").write_text("model:\n  class_path: [a\ntrainer: 3\n")
    (tmp_path / "empty.yaml").touch()
    (tmp_path / "section.yaml").write_text("model: a.B\ntrainer: 3\n")
    (tmp_path / "repeated.yaml").write_text("trainer:\n  max_steps: 1\n  devices: 1\n  max_steps: 2\n")
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "best.ckpt").touch()
    (tmp_path / "half.ckpt").mkdir()
    yield tmp_path
    sys.modules.pop("users_net", None)


def last_line(capsys: pytest.CaptureFixture[str], *args: str, status: int = 2) -> str:
    with pytest.raises(SystemExit) as end:
        main(args)
    assert end.value.code == status
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("error: ")
    return last.removeprefix("error: ")


COMMANDS = {
    ("fitt",): "unknown command `fitt`. Did you mean `fit`?",
    ("frobnicate",): "unknown command `frobnicate`. The commands are fit, validate, test, predict, verify",
    ("recipes", "show", "quickstrat"): "unknown recipe `quickstrat`. Did you mean `quickstart`?",
    ("recipes",): "`action` must be given. See `lightning-hybrid recipes --help`.",
    ("check", "none.ckpt", "--vrbose"): "unknown argument `--vrbose`. See `lightning-hybrid check --help`.",
    ("consolidate", "a", "b", "--weight_only"): "unknown argument `--weight_only`. Did you mean `--weights_only`?",
    ("consolidate",): "`checkpoint` and `out` must be given. See",
    ("verify", "--config", "good.yaml", "--layot=dp2"): "Got `--layot=dp2`. Did you mean `--layout`?",
    ("verify", "--config", "good.yaml", "--layout=td2"): "unknown axis 'td'. Did you mean 'tp2'?",
    ("fit", "--config", "god.yaml"): "`--config`: there is no file god.yaml. Did you mean `good.yaml`?",
    ("fit", "--confg", "good.yaml"): "unknown option `--confg`. Did you mean `--config`?",
    ("fit", "--config", "quickstrat"): "`--config`: there is no file quickstrat. Did you mean `quickstart`?",
    ("fit", "--config", "."): "`--config` must be a file. Got the folder .",
    ("fit", "--config", "list.yaml"): "list.yaml: a configuration has keys such as `model:` and `trainer:`.",
    ("fit", "--config=syntax.yaml"): "syntax.yaml:3:8: this is not YAML: expected ',' or ']', but got ':', while",
    ("fit", "--config"): "`--config` needs a value.",
    ("fit", "--config=empty.yaml"): "empty.yaml: a configuration has keys such as `model:` and `trainer:`.",
    ("fit", "--config=binary.yaml"): "binary.yaml: this is not YAML: 'utf-8' codec can't decode",
    ("fit", "--config=section.yaml"): "section.yaml:2: `trainer` must have options, such as `max_steps: 10`. Got '3'.",
    ("fit", "--config=repeated.yaml"): "repeated.yaml:4: `max_steps` is given twice, here and in line 2, and only one",
    ("recipes", "remove", "chat"): "`action` must be one of ls, cp, show. Got 'remove'.",
    ("recipes", "show", "chat", "--sample", "many"): "`--sample` must be int. Got 'many'.",
    ("verify", "--config", "good.yaml", "--layout"): "`--layout` needs a value.",
    ("verify", "--config", "good.yaml", "--layout=dp2", "--steps=x"): "`--steps` must be int. Got 'x'.",
}


@pytest.mark.parametrize("args", COMMANDS, ids=" ".join)
def test_a_wrong_command_ends_with_one_line(
    folder: Path, args: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert COMMANDS[args] in last_line(capsys, *args)


OPTIONS = {
    "--trainer.max_stepz=3": "unknown option `--trainer.max_stepz`. Did you mean `--trainer.max_steps`?",
    "extra": "unexpected argument `extra`.",
    "--trainer.max_steps=ten": "`trainer.max_steps` must be int. Got 'ten'.",
    "--trainer.precision=bf16-mixd": "Got 'bf16-mixd'. Did you mean `bf16-mixed`?",
    "--trainer.strategy=hybird": "`trainer.strategy`: there is no strategy `hybird`. Did you mean `hybrid`?",
    "--trainer.strategy=hybrid-td2": "Got 'td2' with the unknown axis 'td'. Did you mean 'tp2'?",
    f"{HYBRID} --trainer.strategy.layout=dp2": "`layout` must use every device once. Got 'dp2', which needs 2, with",
    f"{HYBRID} --trainer.strategy.layot=dp2": "`trainer.strategy`: `lightning_hybrid.HybridStrategy` has no parameter "
    "`layot`. Did you mean `layout`?",
    f"{HYBRID} --trainer.strategy.schedule=1F2B": "'DualPipeV'. Got '1F2B'. Did you mean `1F1B`?",
    "--trainer.devices=0": "`Trainer(devices='0')` value is not a valid input using cpu accelerator.",
    "--model=lightning_hybrid.modls.CausalLM": "`model`: `lightning_hybrid` has no `modls`. Did you mean "
    "`lightning_hybrid.models.CausalLM`?",
    "--model=user_net.Net": "there is no module `user_net` for `user_net.Net`. Did you mean `users_net.Net`?",
    "--model=users_net.Nett": "`model`: `users_net` has no `Nett`. Did you mean `users_net.Net`?",
    "--model=users_net.L": "`model`: `users_net.L` is no LightningModule.",
    "--model=users_net.Net --model.width=x": "`model.width` must be int. Got 'x'.",
    "--model=half_done.Net": "the module of `half_done.Net` cannot be imported: No module named 'no_such_requirement'.",
    "--model=fails.Net": "the module of `fails.Net` cannot be imported: RuntimeError: at its import (",
    "--model=users_net.Needs": "`model`: `users_net.Needs` needs `depth` and `kind`, such as `--model.depth VALUE`.",
    "--trainer.callbacks+=TokenThrouput": "`trainer.callbacks`: there is no class `TokenThrouput`. Did you mean "
    "`lightning_hybrid.callbacks.TokenThroughput`?",
    "--trainer.strategy=lightning_hybrid.HybridStrateg": "Did you mean `lightning_hybrid.HybridStrategy`?",
    f"{HYBRID} --trainer.strategy.timeout=abc": "`trainer.strategy.timeout`: Not of type timedelta: Expected a string",
    "--ckpt_path=bset.ckpt": "`--ckpt_path`: there is no checkpoint bset.ckpt. Did you mean `best.ckpt`?",
    f"{HYBRID} --trainer.strategy.microbatches=many": "`trainer.strategy.microbatches` must be int or 'auto'. Got "
    "'many'.",
    f"{HYBRID} --trainer.strategy.recompute=half": "must be 'selective', 'full' or null. Got 'half'.",
    f"{HYBRID} --trainer.strategy.tensor_plan={{blocks: colwize}}": "Got 'colwize' for 'blocks'. Did you mean "
    "'colwise'?",
    f"{HYBRID} --trainer.strategy.checkpoints.trust_pickl=true": "HybridStrategy(checkpoints=...)` has no "
    "parameter `trust_pickl`. Did you mean `trust_pickle`?",
    f"{HYBRID} --trainer.strategy.checkpoints=3": "`trainer.strategy.checkpoints` must have options, such as `{name: "
    "value}`, or be a file of them. Got '3'.",
    f"{HYBRID} --trainer.strategy.process_group_backend=foo": "`process_group_backend` must be a backend of this "
    "build of torch: gloo",
    "--model.transformer.widt=3": "`lightning_hybrid.models.CausalLM(transformer=...)` has no parameter `widt`. Did "
    "you mean `width`?",
    "--model=[a, b]": "`model` must be the class path of a LightningModule or null. Got \"['a', 'b']\".",
    "--model={class_path: users_net.Net, init_arg: {}}": "beside `class_path` there can be `init_args` only.",
    "--data.batch_size=0": "`batch_size` must be a whole number of at least 1. Got 0.",
    "--data.context_length=null": "`context_length` must be a whole number of at least 1. Got None.",
    "--trainer.accumulate_grad_batches=0": "`trainer.accumulate_grad_batches` must be larger than 0. Got 0.",
    "--trainer=3": "`trainer` must have options, such as `{name: value}`, or be a file of them. Got '3'.",
    "--trainer={max_step: 3}": "unknown key `trainer.max_step`. Did you mean `trainer.max_steps`?",
    "--phases=[{layout: dd2}]": "Got 'dd2' with the unknown axis 'dd'. Did you mean 'dp2'?",
    "--ckpt_path=best.ckpt": "`--ckpt_path`: best.ckpt is not a checkpoint: it is no file of `torch.save`",
    "--ckpt_path=half.ckpt": "`--ckpt_path`: half.ckpt is not a checkpoint: it is a folder without manifest.json.",
    "--phases=[{layout: dp4, sequence_lenght: 64}]": "has no parameter `sequence_lenght`. Did you mean "
    "`sequence_length`?",
}


@pytest.mark.parametrize("options", quick(OPTIONS, *list(OPTIONS)[::4]))
def test_a_wrong_option_ends_with_one_line(folder: Path, options: str, capsys: pytest.CaptureFixture[str]) -> None:
    separated = re.split(r" (?=--)", options)
    assert OPTIONS[options] in last_line(capsys, "fit", "--config", "good.yaml", *separated)


def _rename(tree: dict[str, Any], old: str, new: str) -> None:
    tree[new] = tree.pop(old)


CALLBACK = "lightning.pytorch.callbacks.ModelCheckpoint"
EDITS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "top": (lambda c: _rename(c, "model", "modle"), r"bad.yaml:\d+: unknown key `modle`. Did you mean `model`\?"),
    "trainer": (
        lambda c: _rename(c["trainer"], "max_steps", "max_step"),
        r"bad.yaml:\d+: unknown key `trainer.max_step`. Did you mean `trainer.max_steps`\?",
    ),
    "type": (
        lambda c: c["trainer"].update(max_steps="ten"),
        r"bad.yaml:\d+: `trainer.max_steps` must be int. Got 'ten'.",
    ),
    "model": (
        lambda c: c["model"]["init_args"].update(transfomer={"width": 8}),
        r"bad.yaml:\d+: `model`: `lightning_hybrid.models.CausalLM` has no parameter `transfomer`. Did you mean "
        r"`transformer`\?",
    ),
    "nested": (
        lambda c: _rename(c["model"]["init_args"]["transformer"], "width", "widht"),
        r"bad.yaml:\d+: `model`: `lightning_hybrid.models.CausalLM\(transformer=...\)` has no parameter `widht`. "
        r"Did you mean `width`\?",
    ),
    "class": (
        lambda c: c["trainer"].update(callbacks=[{"class_path": "lightning.pytorch.callbacks.ModelCheckpont"}]),
        rf"bad.yaml:\d+: `trainer.callbacks`: .* has no `ModelCheckpont`. Did you mean `{CALLBACK}`\?",
    ),
    "callback": (
        lambda c: c["trainer"].update(callbacks=[{"class_path": CALLBACK, "init_args": {"monitr": "x"}}]),
        rf"bad.yaml:\d+: `trainer.callbacks`: `{CALLBACK}` has no parameter `monitr`. Did you mean `monitor`\?",
    ),
    "value": (
        lambda c: c["model"]["init_args"]["transformer"].update(heads=3),
        r"`width` must be a multiple of 2 \* `heads`.* Got width 16 with 3 heads. Use 18.",
    ),
}


@pytest.mark.parametrize("name", quick(EDITS, "nested", "value"))
def test_a_wrong_file_ends_with_one_line_and_its_place(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    edit, expected = EDITS[name]
    content = deepcopy(CONFIG)
    edit(content)
    (folder / "bad.yaml").write_text(yaml.safe_dump(content))
    last = last_line(capsys, "fit", "--config", "bad.yaml")
    assert re.search(expected, last), last
    if line := re.match(r"bad.yaml:(\d+)", last):
        (key,) = re.findall(r"(?:key|parameter) `(?:\w+\.)*(\w+)`", last) or ["class_path|callbacks|max_steps"]
        assert re.search(key, (folder / "bad.yaml").read_text().splitlines()[int(line[1]) - 1])


def test_nothing_is_required_without_a_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert last_line(capsys, "fit").startswith("`model` and `data` must be given, in the file of `--config`")


def test_classes_of_the_trainer_may_be_given_by_their_path(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu = "--trainer.accelerator=lightning.pytorch.accelerators.CPUAccelerator"
    main(["fit", "--config", "good.yaml", HYBRID, cpu])
    assert "│ stage │" in capsys.readouterr().err.replace("┃", "│")


def test_an_error_of_a_users_constructor_keeps_its_traceback(folder: Path) -> None:
    with pytest.raises(ZeroDivisionError, match="of the user") as raised:
        main(["fit", "--config", "good.yaml", "--model=users_net.Net"])
    assert raised.traceback[-1].path == folder / "users_net.py"
