"""The examples, and the README's lines for models that are there already, as they stand."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from aape_kernels import replace_stem
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


# peft asks transformers for what it has renamed
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_finetune_lora(monkeypatch, capsys, tmp_path):
    if find_spec("peft") is None or find_spec("transformers") is None:
        pytest.skip("peft or transformers is not installed")
    from safetensors.torch import load_file

    monkeypatch.setattr(sys, "argv", ["finetune_lora.py", "--steps", "31", "--out", str(tmp_path)])
    names = runpy.run_path(str(ROOT / "examples" / "finetune_lora.py"), run_name="__main__")
    said = capsys.readouterr().out
    replaced, loaded, merged = (float(change) for change in re.findall(r"the logits change by (\S+)", said))
    assert replaced <= 1e-5
    assert loaded <= 1e-5
    assert merged <= 1e-3
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", said)]
    assert len(losses) == 4
    assert losses[-1] < losses[0] / 2

    # the file holds what was trained, which moved, and nothing else
    saved = load_file(tmp_path / "adapter_model.safetensors")
    trained, whole = (int(count.replace(",", "")) for count in re.search(r"trained: (\S+) .* of (\S+)", said).groups())
    assert sum(value.numel() for value in saved.values()) == trained < whole / 5
    start = replace_stem(names["base"](None, 6, 0)).state_dict()
    stem = "audio_spectrogram_transformer.embeddings.patch_embeddings.projection"
    own = {name for name in start if name.startswith((f"{stem}.encoder", f"{stem}.sblu", f"{stem}.fusion"))}
    assert len(own) == 6
    for name in own | {"classifier.dense.weight"}:
        assert not torch.equal(saved[f"base_model.model.{name}"], start[name])
    assert all("lora_" in name or name.removeprefix("base_model.model.") in start for name in saved)


@pytest.mark.parametrize("script", ["finetune_ast.py", "finetune_lora.py"])
def test_help_of_the_scripts(script):
    """It says what every option is for, and its default, before anything heavy of the script's own is imported."""
    code = f"import runpy, sys; sys.argv = ['{script}', '--help']\n"
    code += f"try: runpy.run_path({str(ROOT / 'examples' / script)!r}, run_name='__main__')\n"
    code += "finally: print('transformers' in sys.modules)"
    done = as_a_user(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("False\n")
    for option in re.findall(r"^  (--\w+)", done.stdout, flags=re.MULTILINE):
        assert re.search(rf"^  {option} .*(\n {{10,}}\S.*)*default", done.stdout, flags=re.MULTILINE), option


NOTEBOOK = ROOT / "examples" / "first_look.ipynb"


def printed(notebook: dict) -> list[str]:
    """By each cell, its figures masked: they differ from processor to processor, and the notebook asserts them."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    texts = ["".join("".join(output.get("text", "")) for output in cell["outputs"]) for cell in cells]
    return [re.sub(r"[\d.,]+", "#", text) for text in texts]


def test_the_notebook_as_it_is_kept():
    """Run once from top to bottom, all of it; small, and without a trace of the machine."""
    text = NOTEBOOK.read_text()
    assert len(text) < 600_000
    cells = json.loads(text)["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output.get("name", "stdout") for output in outputs} == {"stdout"}
    pictures = [output["data"].pop("image/png") for output in outputs if "data" in output]
    assert len(pictures) == 1
    assert not re.search(r"/(work|home|root|tmp|usr|opt)/", json.dumps(cells))
    # what it quotes is what the page says
    quoted = re.findall(r"\d+\.\d(?= %)", "".join("".join(cell["source"]) for cell in cells))
    page = (ROOT / "docs" / "pretraining.md").read_text()
    assert len(quoted) == 3
    for row, figure in zip(("AaPE", "convolution", "convolution + MLP of AaPE's size"), quoted, strict=True):
        assert f"\n| {row} | {figure} (" in page


@pytest.mark.slow
def test_the_notebook_runs():
    pytest.importorskip("ipykernel")
    notebooks = pytest.importorskip("notebooks")
    fresh = notebooks.run(NOTEBOOK)  # its assertions hold
    assert printed(fresh) == printed(json.loads(NOTEBOOK.read_text()))


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
