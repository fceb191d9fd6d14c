"""Which folder of aape_ssl imports which: one direction only."""

import ast
from pathlib import Path

import pytest

from aape_ssl import cli

ROOT = Path(cli.__file__).parent
BELOW = {
    "cli": {"training", "evaluation", "demo"},
    "training": {"evaluation", "saved", "sound", "method"},
    "evaluation": {"saved", "sound", "method"},
    "saved": {"sound", "method"},
    "demo": {"saved", "sound", "method"},
    "sound": {"method"},
    "method": set(),
}
SHARED = {"_lightning", "_arguments", "_files", "_messages", "libraries"}  # how libraries are used, errors worded


def imported(path):
    """First and second name below aape_ssl of everything that a file of it imports from it."""
    package = ["aape_ssl", *path.relative_to(ROOT).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            whole = [*base, *(node.module.split(".") if node.module else [])]
            for name in node.names:
                if whole[0] == "aape_ssl":
                    yield [*whole, name.name][1:]
        elif isinstance(node, ast.Import):
            yield from (name.name.split(".")[1:] for name in node.names if name.name.startswith("aape_ssl."))


def edges():
    for path in sorted(ROOT.rglob("*.py")):
        own = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for names in imported(path):
            yield path.relative_to(ROOT).as_posix(), own, names[0]


def test_every_folder_is_known_and_says_what_it_is():
    folders = {path.parent.name for path in ROOT.rglob("__init__.py")} - {"aape_ssl"}
    assert folders | {"cli"} == BELOW.keys()
    for folder in folders:
        assert ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))


def test_imports_run_one_way():
    found = list(edges())
    wrong = [
        (path, target)
        for path, own, target in found
        if target not in SHARED | {own} and target not in BELOW.get(own, set())
    ]
    assert not wrong
    assert {own for _, own, _ in found} >= BELOW.keys() - {"sound", "method"}  # it does see imports


@pytest.mark.parametrize("folder", ["method", "sound"])
def test_what_lies_below_needs_no_trainer(folder):
    needs = {target for path, own, target in edges() if own == folder and not path.endswith("data.py")}
    assert not needs & {"_lightning", "_arguments"}
