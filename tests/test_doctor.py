import dataclasses
import platform
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import oracle
import pytest
import torch

import aape_kernels
from aape_kernels import doctor, reference, self_test
from aape_kernels.backends import BACKENDS, Call, cpu, cuda, native, reasons
from aape_kernels.weights import Weights

CPU = torch.device("cpu")
COMMAND = [sys.executable, "-m", "aape_kernels.doctor"]


@pytest.fixture
def only_cpu(monkeypatch):
    """Where the machine has a GPU, what is looked at here needs none of its kernels compiled."""
    monkeypatch.setattr(doctor, "_accelerators", lambda: [])


@pytest.fixture
def block(capsys, only_cpu, monkeypatch):
    """A call of `main`: its status, and the block by section title. The tests' own environment is not looked at."""
    for name in doctor.VARIABLES:
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> tuple[int, dict[str, list[str]]]:
        status = doctor.main(arguments)
        printed = capsys.readouterr()
        assert printed.err == ""
        sections: dict[str, list[str]] = {}
        for line in printed.out.splitlines():
            if not line.startswith("  "):
                title, _, rest = line.partition(":")
                sections[title] = [rest.strip()] if rest else []
            else:
                sections[title].append(line.strip())
        return status, sections

    return run


def install(monkeypatch, **functions) -> None:
    """The backend "cpu" that computes what the reference does, but for `functions`; native module or not."""
    run = SimpleNamespace(**{"sblu": reference.sblu, "embed": reference.embed} | functions)
    broken = dataclasses.replace(BACKENDS["cpu"], excuse=lambda call: None, run=run)
    monkeypatch.setitem(BACKENDS, "cpu", broken)


def lines_of(backend: str, sections) -> dict[tuple[str, str], str]:
    """Verdicts of the self-test on the CPU by operation and dtype."""
    (title,) = (title for title in sections if title.startswith("self-test against"))
    rows = (line.split(maxsplit=4) for line in sections[title][1:])
    return {(op, dtype): rest for device, name, op, dtype, rest in rows if (device, name) == ("cpu", backend)}


def test_this_machine(capsys):
    assert doctor.main([]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for words in (aape_kernels.__version__, platform.python_version(), torch.__version__, doctor.cpu_model()):
        assert words in printed.out
    tested = {tuple(row) for row in re.findall(r"^  (\S+) +(\S+) +\S+ +\S+ +[\de.+-]+ / .* ok$", printed.out, re.M)}
    devices = [CPU, *doctor._accelerators()]
    usable = {(device, name) for device in devices for name, why in reasons(call(device)).items() if why is None}
    assert tested == {(str(device), name) for device, name in usable}
    assert re.search(r"^self-test: all \d+ ok$", printed.out, re.M)


def call(device: torch.device, op: str = "sblu") -> Call:
    return Call(op, device, torch.float32)


def test_every_backend_is_listed_with_its_own_reason(block):
    status, sections = block("--no-self-test")
    assert status == 0
    rows = dict(line.split(maxsplit=1) for line in sections["backends for float32 on cpu, fastest first"])
    auto = rows.pop("auto")
    why = reasons(call(CPU))
    assert rows == {name: "usable" if words is None else f"no: {words}" for name, words in why.items()}
    assert auto == f"takes {next(name for name, words in why.items() if words is None)}"
    assert not [title for title in sections if title.startswith("self-test")]


def test_reasons_that_depend_on_the_operation(block, monkeypatch):
    install(monkeypatch)
    excuse = {"sblu": None, "embed": "it has no stem"}
    only_sblu = dataclasses.replace(BACKENDS["cpu"], excuse=lambda call: excuse[call.op])
    monkeypatch.setitem(BACKENDS, "cpu", only_sblu)
    status, sections = block()
    assert status == 0
    rows = sections["backends for float32 on cpu, fastest first"]
    assert "cpu        sblu: usable; embed: no: it has no stem" in rows
    assert "auto       sblu: takes cpu; embed: takes reference" in rows
    assert {op for op, _ in lines_of("cpu", sections)} == {"sblu"}


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("reference", "takes reference, which AAPE_BACKEND names"),
        ("fastest", "raises: AAPE_BACKEND: expected one of auto, .* got 'fastest'"),
        ("cuda", "sblu: raises: AAPE_BACKEND: 'cuda' cannot run sblu .*; embed: raises: .*"),
    ],
)
def test_auto_follows_the_environment(block, monkeypatch, value, words):
    monkeypatch.setenv("AAPE_BACKEND", value)
    _, sections = block("--no-self-test")
    assert sections["environment variables"] == [f"AAPE_BACKEND  {value!r}"]
    rows = dict(line.split(maxsplit=1) for line in sections["backends for float32 on cpu, fastest first"])
    assert re.fullmatch(words, rows["auto"])


def test_wrong_numbers_fail(block, monkeypatch):
    install(monkeypatch, sblu=lambda *arguments: reference.sblu(*arguments) * 1.00001)
    status, sections = block()
    assert status == 1
    verdicts = lines_of("cpu", sections)
    assert re.match(r"1\.0e-05 / 2e-06 .* FAILED: output \(16x16 patches\), .*", verdicts["sblu", "float32"])
    assert all(verdicts[key].endswith(" ok") for key in verdicts if key != ("sblu", "float32"))
    assert all(text.endswith(" ok") for text in lines_of("reference", sections).values())
    assert sections["self-test"] == ["1 of 8 FAILED"]


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_fails(block, monkeypatch, wrong):
    install(monkeypatch, embed=lambda *arguments: reference.embed(*arguments) * wrong)
    status, sections = block()
    assert status == 1
    assert lines_of("cpu", sections)["embed", "float32"].startswith("inf / 1e-05")


@pytest.mark.parametrize(
    ("op", "position"), [(op, k) for op, names in self_test.INPUTS.items() for k in range(len(names))]
)
def test_every_gradient_is_looked_at(monkeypatch, op, position):
    def changed(value):
        value = value * 1
        value.register_hook(lambda gradient: gradient * 1.001)
        return value

    def run(*arguments):
        given = list(arguments)
        if op == "embed" and position:
            name = Weights._fields[position - 1]
            given[1] = given[1]._replace(**{name: changed(getattr(given[1], name))})
        else:
            given[position] = changed(given[position])
        return getattr(reference, op)(*given)

    given = self_test.problems(op, torch.float32)
    install(monkeypatch)
    right, text = self_test.verdict("cpu", CPU, given)
    assert right, text
    install(monkeypatch, **{op: run})
    right, text = self_test.verdict("cpu", CPU, given)
    assert not right
    name = f"gradient of {self_test.INPUTS[op][position]}"
    assert text.endswith(f"FAILED: {name} (16x16 patches), {name} (3x5 patches)")


def test_a_backend_that_raises_is_one_line_and_the_rest_goes_on(block, monkeypatch):
    def run(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access\nCompile with TORCH_USE_CUDA_DSA")

    install(monkeypatch, sblu=run)
    status, sections = block()
    assert status == 1
    verdicts = lines_of("cpu", sections)
    assert verdicts["sblu", "float32"] == "FAILED: RuntimeError: CUDA error: an illegal memory access"
    assert verdicts["embed", "float32"].endswith(" ok")
    assert sections["self-test"] == ["2 of 8 FAILED"]


def no_native_module():
    raise ImportError("libgomp.so.1: cannot open shared object file")


def test_without_the_native_module(block, monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BUILT", False)
    monkeypatch.setattr(native, "load", no_native_module)
    status, sections = block()
    assert status == 0
    assert sections["native module"] == ["cannot be loaded  ImportError: libgomp.so.1: cannot open shared object file"]
    rows = dict(line.split(maxsplit=1) for line in sections["backends for float32 on cpu, fastest first"])
    assert rows["cpu"] == f"no: {reasons(call(CPU))['cpu']}"
    assert rows["auto"] == "takes reference"
    assert lines_of("cpu", sections) == {}
    assert len(lines_of("reference", sections)) == 4


def test_a_native_module_that_does_not_load_fails_the_self_test(block, monkeypatch):
    monkeypatch.setattr(cpu, "NATIVE_BUILT", True)
    monkeypatch.setattr(native, "load", no_native_module)
    status, sections = block()
    assert status == 1
    assert set(lines_of("cpu", sections).values()) == {
        "FAILED: ImportError: libgomp.so.1: cannot open shared object file"
    }


@pytest.mark.skipif(not cpu.NATIVE_BUILT, reason="the native module was not built")
def test_the_native_module_speaks_for_itself(block):
    _, sections = block("--no-self-test")
    *lines, last = sections["native module"]
    assert last.startswith("CUDA kernels")
    assert last.endswith(cuda.unusable() or "a driver is there")
    facts = dict(line.split(maxsplit=1) for line in lines)
    info = native.load().build_info()
    assert facts.keys() == info.keys()
    assert facts["compiler"] == info["compiler"]
    assert facts["instruction_sets"] == ", ".join(info["instruction_sets"])


def test_modules_that_are_missing_or_broken(tmp_path, monkeypatch):
    (tmp_path / "whole.py").write_text("__version__ = '3.6'")
    (tmp_path / "broken.py").write_text("raise OSError('libcuda.so.1: cannot open\\nmore')")
    (tmp_path / "needy.py").write_text("import surely_missing")
    monkeypatch.syspath_prepend(tmp_path)
    assert doctor._version("whole") == "3.6"
    assert doctor._version("surely_missing") == "not installed"
    assert doctor._version("broken") == "cannot be imported: OSError: libcuda.so.1: cannot open"
    assert doctor._version("needy") == "cannot be imported: ModuleNotFoundError: No module named 'surely_missing'"


def gpu(monkeypatch, count: int, properties) -> None:
    """A CUDA device as far as torch tells, whose driver answers `properties`, and on which nothing can run."""

    def counted():
        warnings.warn("CUDA initialization: the driver is too old", UserWarning, stacklevel=1)
        return count

    def refuse(*arguments, **options):
        raise RuntimeError("no driver\nsee elsewhere")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", counted)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties or refuse)
    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(torch.version, "hip", None)


def test_a_gpu(monkeypatch, tmp_path):
    h200 = SimpleNamespace(name="NVIDIA H200", total_memory=140 * 2**30, major=9, minor=0)
    gpu(monkeypatch, 2, lambda device: h200)
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.86\necho 570.86\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    devices = doctor._accelerators()
    assert devices == [torch.device("cuda", 0), torch.device("cuda", 1)]
    facts = "NVIDIA H200, 140.0 GiB, compute capability 9.0, driver "
    assert doctor._devices([CPU, *devices])[1:] == [("cuda:0", facts + "570.86"), ("cuda:1", facts + "570.86")]
    tool.write_text("#!/bin/sh\necho cannot talk to the driver\nexit 9\n")
    assert doctor._describe(devices[0]) == facts + "unknown: cannot talk to the driver"
    tool.unlink()
    assert doctor._describe(devices[0]) == facts + "unknown: nvidia-smi cannot run"


def test_a_driver_too_broken_to_ask(monkeypatch, capsys):
    gpu(monkeypatch, 1, None)
    broken = dataclasses.replace(BACKENDS["reference"], name="broken", excuse=torch.cuda.get_device_properties)
    monkeypatch.setitem(BACKENDS, "broken", broken)
    assert doctor.main([]) == 1
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\n  cuda:0  cannot be asked: RuntimeError: no driver\n" in printed.out
    assert re.search(
        r"on cuda:0, fastest first\n(  .*\n)*  broken     cannot be asked: RuntimeError: no driver\n", printed.out
    )
    assert re.search(r"\n  cuda:0 +broken +sblu +float32 +FAILED: RuntimeError: no driver\n", printed.out)


def test_no_gpu_with_the_reason(monkeypatch):
    gpu(monkeypatch, 0, None)
    assert doctor._accelerators() == []
    assert doctor._devices([CPU])[1] == ("GPU", "no cuda device: RuntimeError: no driver")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: None)
    assert doctor._accelerators() == []
    assert doctor._devices([CPU])[1] == ("GPU", "none, and this torch is built for none")


def test_the_self_test_leaves_the_process_as_it_is(monkeypatch):
    monkeypatch.setenv("AAPE_AUTOTUNE", "1")
    seen = []

    def run(*arguments):
        seen.append(doctor.os.environ.get("AAPE_AUTOTUNE"))
        return reference.sblu(*arguments)

    install(monkeypatch, sblu=run)
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert all(right for right, _ in doctor._results([CPU]))
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    assert set(seen) == {None}
    assert doctor.os.environ["AAPE_AUTOTUNE"] == "1"


def test_the_bounds_are_those_of_the_tests():
    for (op, dtype), bounds in self_test.BOUNDS.items():
        assert bounds == tuple(oracle.bound(dtype, op == "embed", gradient) for gradient in (False, True))


def test_the_command():
    done = subprocess.run([*COMMAND, "--no-self-test"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"versions\n  aape_kernels  {aape_kernels.__version__} in ")
    assert done.stdout.splitlines()[-1].startswith("  auto       takes ")


def test_a_reader_who_leaves_early():
    with subprocess.Popen(COMMAND, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.parametrize(("argument", "status", "words"), [("--help", 0, "--no-self-test"), ("--fix", 2, "--fix")])
def test_options(capsys, argument, status, words):
    with pytest.raises(SystemExit) as left:
        doctor.main([argument])
    assert left.value.code == status
    printed = capsys.readouterr()
    assert words in (printed.err if status else printed.out)
