"""Every page of the site lies where it lies in the repository, so that one link serves both; README.md is its home."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE_DOCS = (
    "README.md",
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "aape_kernels/reference.py",
    "benchmarks/NOTES.md",
    "benchmarks/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("benchmarks/results/**/README.md"))),
    "csrc/magnitudes.h",
    "csrc/sblu.h",
    "examples/finetune_ast.py",
    "examples/finetune_lora.py",
    "examples/first_look.ipynb",
    "python/aape_ssl/demo/clips/LICENSE.md",
    "tests/oracle.py",
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The folder docs under its own name, and what the pages link to outside of it."""
    inside = [file for file in files if file.src_dir == config.docs_dir]
    for file in inside:
        files.remove(file)
    paths = [f"docs/{file.src_uri}" for file in inside if not file.src_uri.endswith(".py")]
    for path in (*OUTSIDE_DOCS, *paths):
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    return files
