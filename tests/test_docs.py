"""The site builds without a warning and loads nothing from afar; what pages and docstrings show is what happens."""

import doctest
import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path

import pytest

import aape_kernels
from aape_kernels.backends import cpu, cuda

ROOT = Path(__file__).resolve().parents[1]
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not (find_spec("mkdocs") and find_spec("material") and find_spec("mkdocstrings")):
        pytest.skip("mkdocs is not installed")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


class Fetched(HTMLParser):
    """What a browser loads with a page; where a reader may go is not among it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.found += [given["src"]] if given.get("src") else []
        self.found += [given["href"]] if tag == "link" and given.get("href") else []


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert {page.name for page in pages} >= {"index.html", "models.html", "api.html", "maths.html"}
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text())
        assert parser.found
        assert not [url for url in parser.found if re.match(r"(\w+:)?//", url)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"url\(\W?(https?:)?//", sheet.read_text()), sheet


@pytest.mark.slow
def test_the_api_page_has_every_public_name_and_its_formulas(site):
    page = (site / "docs" / "api.html").read_text()
    for name in aape_kernels.__all__:
        assert f'id="aape_kernels.{name}"' in page
    formulas = (
        "token = W_p · vec(patch) + b_p + W_y · f,   f = [Re y ; Im y ; n]",
        "quadrature:  h(d) = g e^{−Λd} for d",
    )
    for formula in formulas:
        assert re.search(r"<code[^>]*>[^<]*" + re.escape(formula), page), formula
    # a docstring's example that is no section of its own becomes quotations in quotations
    assert "<blockquote>" not in page


@pytest.mark.parametrize("name", ["plot", "ranges", "sizes", "stem", "surgery"])
def test_docstrings(name):
    found = doctest.testmod(importlib.import_module(f"aape_kernels.{name}"), extraglobs={"AaPE": aape_kernels.AaPE})
    assert found.attempted
    assert not found.failed


@pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")
@pytest.mark.filterwarnings("ignore:`torch.jit.*is deprecated:DeprecationWarning")
def test_troubleshooting():
    code = "\n".join(re.findall(r"```python\n(.*?)```", TROUBLESHOOTING, flags=re.DOTALL))
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    found = runner.run(doctest.DocTestParser().get_doctest(code, {}, "troubleshooting.md", None, 0))
    assert found.attempted > 10
    assert not found.failed


def test_reasons_in_troubleshooting(monkeypatch):
    class Module:
        @staticmethod
        def build_info():
            return {"kernels": ("cpu",)}

    monkeypatch.setattr(cuda, "NATIVE_BUILT", True)
    monkeypatch.setattr(cuda, "load", lambda: Module)
    assert f"\n{cuda.unusable.__wrapped__()}\n" in TROUBLESHOOTING
    monkeypatch.setattr(cpu, "NATIVE_BUILT", False)
    assert f"\nbackend 'auto' on cpu passes over 'cpu': {cpu.reason(None)}\n" in TROUBLESHOOTING
