"""The examples, and the README's lines for models that are there already, as they stand."""

import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from libraries import timm, transformers  # noqa: F401  # what the examples import

from aape_kernels.surgery import KNOWN

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models are so small that a second thread only waits, for long where the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_finetune_ast(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["finetune_ast.py", "--steps", "21"])
    runpy.run_path(str(ROOT / "examples" / "finetune_ast.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert float(re.search(r"the logits change by (\S+)", said)[1]) <= 1e-5
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 2
    assert float(re.search(r"have norm (\S+)", said)[1]) > 0.01


def test_models_page_has_every_row():
    page = (ROOT / "docs" / "models.md").read_text()
    for known in KNOWN:
        for name in re.findall(r"\b[A-Z][\w-]+", known.models):
            assert re.search(rf"^\|.*\b{name}\b", page, flags=re.MULTILINE), name


def snippets() -> list[str]:
    section = (ROOT / "README.md").read_text().partition("## Into an existing ViT")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_readme(library):
    (code,) = [code for code in snippets() if f"import {library}" in code or f"from {library} import" in code]
    assert len(code.strip().splitlines()) <= 11
    torch.manual_seed(0)
    exec(code, {})
