"""What nvcc makes of csrc/cuda, without a GPU: every source by itself, for every architecture of the build.

Nothing may spill or use local memory beyond what SPILLS names, registers must leave room for as many blocks as the
kernels ask for, and what is usual must be on tensor cores and move 16 bytes at once. build/cuda-resources-*.txt have
the registers of every kernel afterwards.
"""

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 100, 120)
REGISTERS = 65536  # of a multiprocessor, on all of them
NVCC = shutil.which("nvcc")

pytestmark = [pytest.mark.skipif(NVCC is None, reason="no nvcc was found"), pytest.mark.slow]

ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


@pytest.fixture(scope="module")
def cubins(tmp_path_factory):
    """A function of architecture and source, once for each: what ptxas says, and the cubin."""
    into = tmp_path_factory.mktemp("cubins")

    @cache
    def one(architecture, source):
        cubin = into / f"{source}-{architecture}.cubin"
        command = [NVCC, "-std=c++17", "--expt-relaxed-constexpr", "--fmad=false", "-Icsrc", "-Icsrc/cuda", "-O3"]
        command += ["-Xptxas", "-v", f"-arch=sm_{architecture}", "-cubin", "-o", str(cubin), f"csrc/cuda/{source}.cu"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        lines = [f"{entry['registers']} registers, {entry['name']}" for entry in ENTRY.finditer(done.stderr)]
        (ROOT / "build").mkdir(exist_ok=True)
        (ROOT / "build" / f"cuda-resources-sm_{architecture}-{source}.txt").write_text("\n".join(lines) + "\n")
        return done, cubin

    return one


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    "architecture",
    [pytest.param(each, marks=[] if each == 90 else pytest.mark.exhaustive, id=f"sm_{each}") for each in ARCHITECTURES],
)
def test_nothing_spills(cubins, architecture, source):
    done, _ = cubins(architecture, source)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    entries = list(ENTRY.finditer(done.stderr))
    assert len(entries) == done.stderr.count("Compiling entry function") == EXPECTED[source]
    for entry in entries:
        allowed = [
            size for (*of, sizes), size in SPILLS.items() if of == [source, architecture] and sizes in entry["name"]
        ]
        assert max(int(entry[each]) for each in ("stack", "stores", "loads")) <= sum(allowed), entry["name"]
        assert int(entry["registers"]) * threads(entry["name"]) <= REGISTERS, entry["name"]


def test_an_architecture_adds_little_to_the_module(cubins):
    """Bytes, before they are compressed; a wheel has them once for every architecture."""
    sizes = {source: cubins(90, source)[1].stat().st_size for source in SOURCES}
    assert sum(sizes.values()) <= 5.5e6, sizes


def threads(name: str) -> int:
    """What a multiprocessor is to have of a kernel at once, by its __launch_bounds__."""
    if sizes := re.search(r"SizesI(f|13__nv_bfloat16)", name):  # one block of so many warps
        if "backward" in name and (sizes[1] == "f" or re.search(r"UnitSizesI\w+?Li32E", name)):
            return 32 * 8
        if "warp_tokens" in name and sizes[1] == "f":
            return 32 * 8
        warps = re.search(r"Li\d+ELi\d+ELi(\d+)E", name)
        return 32 * (int(warps[1]) if warps else 12)
    # 256 threads, three blocks of them, of the stem two, or one where the arithmetic is double's
    return 256 if re.search(r"Idd[il]E", name) else 512 if "11stem_kernel" in name else 768


# Kernels of a source. Any float and double, each for two widths of offsets; the overlap-add: four pairs of dtypes,
# likewise, and once more by fours. What standardises: float and double. On tensor cores: two sizes, each for the usual
# geometry and for any, of bfloat16 and float32, and the stem of float32 under autocast, too.
EXPECTED = {
    "devices": 0, "gather": 4, "gradients": 1, "overlap_add": 12, "sblu_backward": 12, "sblu_forward": 4,
    "standardise": 2, "stem": 4, "warp_sblu": 8, "warp_sblu_backward": 8, "warp_stem": 16, "warp_stem_backward": 16,
    "warp_tokens": 12,
}  # fmt: skip


# What a lane of the stem's backward on tensor cores may keep in memory while a loop runs, in bytes for a tile of 16
# tokens, which moves 20 kB: 16 warps of it fit on a multiprocessor with 128 registers a lane. On an H100 they do.
USUAL_SIZES = "SizesI13__nv_bfloat16S3_Li16ELi32ELi16ELb1E"
SPILLS = {
    ("warp_stem_backward", 80, USUAL_SIZES): 16,
    ("warp_stem_backward", 120, USUAL_SIZES): 8,
    # of architectures that none of this has run on: one to three words that a loop over tiles reads once a tile, and
    # writes never
    ("warp_sblu", 100, "SizesIfLi16ELb1E"): 8,
    ("warp_sblu", 100, "SizesIfLi32ELb1E"): 16,
    ("warp_sblu", 120, "SizesIfLi16ELb1E"): 8,
    ("warp_sblu", 120, "SizesIfLi32ELb1E"): 16,
    ("warp_stem", 100, "SizesIf6__halfLi16ELi32ELi12ELb1E"): 8,
    ("warp_stem", 100, "SizesIf13__nv_bfloat16Li16ELi32ELi12ELb1E"): 8,
    ("warp_stem", 120, "SizesIffLi16ELi32ELi12ELb1E"): 8,
    ("warp_tokens", 120, "SizesIffLi32ELi64ELi8ELb1E"): 8,
    # and 14 words where a geometry is not the usual one and a lane has all the registers that there are
    ("warp_stem_backward", 100, "SizesIf6__halfLi32ELi64ELi8ELb0E"): 392,
    ("warp_stem_backward", 100, "SizesIf13__nv_bfloat16Li32ELi64ELi8ELb0E"): 392,
    ("warp_stem_backward", 120, "SizesIf6__halfLi32ELi64ELi8ELb0E"): 364,
    ("warp_stem_backward", 120, "SizesIf13__nv_bfloat16Li32ELi64ELi8ELb0E"): 364,
}


def functions(cubin: Path) -> dict[str, list[str]]:
    """Mangled name -> instructions, as Triton's copy of cuobjdump prints them."""
    triton = pytest.importorskip("triton", reason="its wheel has cuobjdump")
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    out = subprocess.run([cuobjdump, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^\s*Function : (\w+)$", out, flags=re.MULTILINE)[1:]
    names, bodies = parts[::2], parts[1::2]
    return {
        name: re.findall(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", body)
        for name, body in zip(names, bodies, strict=True)
    }


ON_TENSOR_CORES = {
    "warp_stem": (USUAL_SIZES, "SizesIffLi16ELi32ELi12ELb1E"),
    "warp_stem_backward": (USUAL_SIZES, "SizesIffLi16ELi32ELi12ELb1E"),
    "warp_tokens": (USUAL_SIZES, "SizesIffLi16ELi32ELi12ELb1E"),
    "warp_sblu": ("UnitSizesI13__nv_bfloat16Li16ELb1E", "UnitSizesIfLi16ELb1E"),
    "warp_sblu_backward": ("UnitSizesI13__nv_bfloat16Li16ELb1E", "UnitSizesIfLi16ELb1E"),
}


@pytest.mark.parametrize(
    ("source", "sizes"), [(source, one) for source, both in ON_TENSOR_CORES.items() for one in both], ids=str
)
def test_the_usual_path_of_an_h100_on_tensor_cores(cubins, source, sizes):
    """The default sizes and geometry: products, pixels and stores of 16 bytes; ldmatrix turns frames of bfloat16."""
    _, cubin = cubins(90, source)
    (instructions,) = [body for name, body in functions(cubin).items() if f"{source}_kernel" in name and sizes in name]
    counted = Counter(each.partition(".")[0] for each in instructions)
    assert counted["LDL"] == counted["STL"] == counted["DFMA"] == 0
    assert counted["HMMA"] >= 8
    assert counted["LDSM"] >= 2 if "bfloat16" in sizes else any(each.startswith("LDS.128") for each in instructions)
    assert sum(each.startswith("LDG.E.128") for each in instructions) >= 16
    if "stem" in source:
        assert sum(each.startswith("STG.E.128") for each in instructions) >= 16


@pytest.mark.parametrize("source", ON_TENSOR_CORES)
def test_code_fits_into_the_instruction_cache(cubins, source):
    """Three quarters of a multiprocessor's 128 kB, 16 bytes an instruction (benchmarks/NOTES.md)."""
    _, cubin = cubins(90, source)
    sizes = {name: len(body) for name, body in functions(cubin).items() if "ELb1EEEEE" in name}
    assert len(sizes) >= 4
    assert max(sizes.values()) <= 6144, sizes
