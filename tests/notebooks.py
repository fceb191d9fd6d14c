"""Runs a notebook as a user would, in a kernel of its own; `python tests/notebooks.py FILE` keeps what it puts out."""

import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def run(path: Path) -> nbformat.NotebookNode:
    """A copy with fresh outputs, without times and versions. Errors: `CellExecutionError` with the cell's traceback."""
    notebook = nbformat.read(path, as_version=4)
    there = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, record_timing=False, coalesce_streams=True, resources=there).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


if __name__ == "__main__":
    file = Path(sys.argv[1])
    nbformat.write(run(file), file)
