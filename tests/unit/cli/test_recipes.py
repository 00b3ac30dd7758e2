"""`recipes ls|cp|show`, and recipes by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from lightning_hybrid.cli import main
from lightning_hybrid.cli.configs import Configs
from lightning_hybrid.cli.recipe_files import recipes
from lightning_hybrid.cli.recipes import summary

RECIPES = Path(__file__).parents[3] / "recipes"


def test_all_are_listed_with_a_description(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "ls"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(recipes())
    assert {path.stem for path in RECIPES.glob("*.yaml")} <= set(recipes())
    for path in recipes().values():
        assert 10 < len(summary(path)) < 100, path


def test_one_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "show", "quickstart"])
    assert capsys.readouterr().out == (RECIPES / "quickstart.yaml").read_text()


def test_one_is_copied_and_no_file_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "cp", "quickstart", str(tmp_path / "mine")])
    copied = tmp_path / "mine/quickstart.yaml"
    assert yaml.safe_load(copied.read_text()) == yaml.safe_load((RECIPES / "quickstart.yaml").read_text())
    assert f"lightning-hybrid fit --config {copied}" in capsys.readouterr().out
    copied.write_text("changed")
    with pytest.raises(SystemExit, match="1"):
        main(["recipes", "cp", "quickstart", str(tmp_path / "mine")])
    assert "quickstart.yaml exists. Remove it, or choose another folder" in capsys.readouterr().err
    assert copied.read_text() == "changed"


def test_a_configuration_may_be_the_name_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = str(recipes()["quickstart"])
    assert Configs(["--config", "quickstart", "--trainer.max_steps=1"]).args[1] == expected
    assert Configs(["--config=quickstart"]).args == [f"--config={expected}"]
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("trainer: {}")
    assert Configs(["-c", "quickstart"]).args == ["-c", "quickstart"]  # a file has precedence
    inline = ["--config", "{trainer: {max_steps: 1}}"]
    assert Configs(inline).args == inline


def _conversations(folder: Path) -> Path:
    file = folder / "talk.jsonl"
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    file.write_text(f"{json.dumps({'conversations': turns})}\n" * 3)
    return file


def test_samples_are_shown_with_their_loss_mask(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["recipes", "show", "chat", "--sample", "1", f"--data.path={_conversations(tmp_path)}"])
    assert capsys.readouterr().out.splitlines() == [
        "sample 0: 11 tokens, 6 with loss",
        "       | <|user|>Hi<|end|><|assistant|>",
        "  loss | Hello<|end|>",
    ]


def test_samples_of_an_encoder_and_a_decoder_are_shown_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(f"{json.dumps({'source': 'house', 'target': 'maison'})}\n" * 3)
    main(["recipes", "show", "translation", "--sample", "1", f"--data.path={file}"])
    shown = ["sample 0: 6 tokens, 7 with loss", "       | house<|end|>", "  loss | maison<|end|>"]
    assert capsys.readouterr().out.splitlines() == shown


def test_samples_with_a_gap_are_shown_in_the_order_of_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.py").write_text("first = second\n")
    main(["recipes", "show", "code_completion", "--sample", "1", f"--data.path={tmp_path}", "--data.fim_rate=1.0"])
    head, prompt, *rest = capsys.readouterr().out.splitlines()
    assert head.startswith("sample 0: ")
    assert prompt.startswith("       | <|fim_prefix|><|fim_suffix|>"), "SPM: the suffix first"
    assert rest[-1] in ("  loss | first<|end|>", "  loss | second<|end|>")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["chat", "--sample", "--data.path=none.jsonl"], "error: `path`: there is no file or folder none.jsonl."),
        (["quickstart", "--sample"], "error: `--sample` needs a data module with labels. quickstart has StdlibText."),
        (["chat", "--data.path=x"], "error: unknown argument `--data.path`."),
        (["chat", "--sample", "--data.pat=x"], "has no parameter `pat`. Did you mean `path`?"),
    ],
)
def test_samples_that_cannot_be_shown(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["recipes", "show", *args])
    assert message in capsys.readouterr().err
