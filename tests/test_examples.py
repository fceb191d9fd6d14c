"""The examples, and the README's lines for models that are there already, as they stand."""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

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


def snippets(section: str) -> list[str]:
    text = (ROOT / "README.md").read_text().partition(f"## {section}")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def as_a_user(code: str) -> subprocess.CompletedProcess:
    """In a process that nothing was prepared for."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_readme(library):
    """As it stands; where that fails over a library of another build, with what README then says to begin with."""
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    found = snippets("Into an existing ViT")
    (code,) = [code for code in found if f"import {library}" in code or f"from {library} import" in code]
    (mending,) = [code for code in found if "mend()" in code]
    assert len(code.strip().splitlines()) <= 11
    done = as_a_user(code)
    if "torchvision::nms does not exist" in done.stderr or "torchaudio" in done.stderr:
        done = as_a_user(mending + code)
    assert done.returncode == 0, done.stderr


def test_ten_lines():
    (code,) = snippets("Ten lines")
    torch.manual_seed(0)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    aape, conv = (float(line.split()[1]) for line in said.getvalue().splitlines())
    assert aape > 0.98
    assert 0.35 < conv < 0.65


def test_usage():
    (code,) = snippets("Usage")
    names: dict = {}
    exec(code, names)
    assert names["tokens"].shape == (8, 512, 768)
