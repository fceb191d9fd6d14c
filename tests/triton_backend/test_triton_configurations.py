"""The choice of launch configurations: the table, and the search, whose clock is replaced here."""

import json
import logging

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from aape_kernels.backends.triton import configurations  # noqa: E402  # it imports triton
from aape_kernels.backends.triton.configurations import (  # noqa: E402
    CANDIDATES,
    DEFAULTS,
    Configuration,
    candidates,
    configuration,
)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
FASTEST = CANDIDATES[3]


@pytest.fixture
def search(monkeypatch, tmp_path):
    """The search on a GPU that is not there, FASTEST being the fastest; returns its cache file."""
    launched = []

    def clock(run, warmup, rep):
        run()
        candidate = launched[-1]
        if candidate.num_warps == 8:
            raise triton.runtime.errors.OutOfResources(300_000, 200_000, "shared memory")
        return 1.0 if candidate == FASTEST else 2.0

    file = tmp_path / "folder" / "autotune.json"
    monkeypatch.setenv("AAPE_AUTOTUNE", "1")
    monkeypatch.setenv("AAPE_AUTOTUNE_CACHE", str(file))
    monkeypatch.setattr(triton.testing, "do_bench", clock)
    monkeypatch.setattr(configurations, "_capability", lambda device: 9)
    monkeypatch.setattr(configurations, "_machine", lambda index: "Some GPU,")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configurations._kept.cache_clear()
    yield file, launched
    configurations._kept.cache_clear()


def test_every_kernel_has_a_row_of_each_size(monkeypatch):
    kernels = {kernel for kernel, _ in DEFAULTS}
    assert DEFAULTS.keys() == {(kernel, size) for kernel in kernels for size in ("small", "large")}
    assert {(kernel, size) for _, kernel, size, _ in configurations.TABLE} <= DEFAULTS.keys()
    assert all(c.tokens >= 16 and c.tokens & (c.tokens - 1) == 0 for c in (*DEFAULTS.values(), *CANDIDATES))


def test_table_by_capability_and_size(monkeypatch):
    def chosen(rows):
        return configuration("stem_fwd", rows, "", GPU, lambda c: None)

    monkeypatch.setattr(configurations, "TABLE", {(9, "stem_fwd", "large", False): Configuration(64, 8, 3)})
    monkeypatch.setattr(configurations, "_capability", lambda device: 9)
    assert chosen(configurations.SMALL) == Configuration(64, 8, 3)
    assert chosen(configurations.SMALL - 1) == DEFAULTS["stem_fwd", "small"]
    monkeypatch.setattr(configurations, "_capability", lambda device: 8)
    assert chosen(configurations.SMALL) == DEFAULTS["stem_fwd", "large"]


def test_no_search_on_the_cpu(search):
    _, launched = search
    assert configuration("stem_fwd", 100, "", CPU, launched.append) == DEFAULTS["stem_fwd", "small"]
    assert not launched


def test_search_takes_the_fastest_and_keeps_it(search):
    file, launched = search
    assert configuration("sblu_fwd", 100, "S=32", GPU, launched.append) == FASTEST
    assert sorted(map(str, launched)) == sorted(map(str, {DEFAULTS["sblu_fwd", "small"], *CANDIDATES}))
    count = len(launched)
    assert configuration("sblu_fwd", 200, "S=32", GPU, launched.append) == FASTEST  # the same size class
    configurations._kept.cache_clear()  # as a new process finds it
    assert configuration("sblu_fwd", 100, "S=32", GPU, launched.append) == FASTEST
    assert len(launched) == count
    configuration("sblu_fwd", 100, "S=8", GPU, launched.append)
    assert len(launched) == 2 * count
    assert len(json.loads(file.read_text())) == 2


def test_stages_are_searched_where_they_make_a_difference():
    assert candidates("sblu_fwd") == CANDIDATES
    assert {candidate.num_stages for candidate in candidates("stem_fwd")} == {1, 2, 3}
    assert set(CANDIDATES) < set(candidates("stem_fwd"))


@pytest.mark.parametrize(
    "error", [ValueError("no\nsuch layout"), RuntimeError("Triton Error [CUDA]: invalid argument")]
)
def test_a_candidate_that_fails_is_left_out_with_a_line(search, monkeypatch, caplog, error):
    _, launched = search
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def run(candidate):
        if candidate.tokens == 16:
            raise error
        launched.append(candidate)

    monkeypatch.setattr(triton.testing, "do_bench", lambda run, warmup, rep: run() or 1.0)
    with caplog.at_level(logging.WARNING, logger="aape_kernels"):
        assert configuration("sblu_fwd", 100, "S=32", GPU, run).tokens == 32
    failed = [line for line in caplog.messages if "cannot run" in line]
    assert len(failed) == sum(candidate.tokens == 16 for candidate in CANDIDATES)
    assert all("Some GPU, sblu_fwd small S=32 with Configuration(tokens=16" in line for line in failed)
    assert type(error).__name__ in failed[0]


def test_a_candidate_that_loses_the_device_ends_the_search(search, monkeypatch):
    file, launched = search

    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def run(candidate):
        launched.append(candidate)
        lost()

    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    message = r"Some GPU, sblu_fwd small S=32 with Configuration\(tokens=16.*the device is lost.*illegal memory access"
    with pytest.raises(RuntimeError, match=message):
        configuration("sblu_fwd", 100, "S=32", GPU, run)
    assert len(launched) == 1
    assert not file.exists()


def test_processes_side_by_side_keep_each_others_results(search):
    file, launched = search
    configuration("sblu_fwd", 100, "S=32", GPU, launched.append)
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"another process's": {"tokens": 16, "num_warps": 4, "num_stages": 1}}))
    configuration("sblu_fwd", 100, "S=8", GPU, launched.append)
    assert len(json.loads(file.read_text())) == 3


def test_while_a_graph_is_captured_nothing_is_timed(search, monkeypatch):
    _, launched = search
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert configuration("sblu_fwd", 100, "", GPU, launched.append) == DEFAULTS["sblu_fwd", "small"]
        assert not launched
    assert configuration("sblu_fwd", 100, "", GPU, launched.append) == FASTEST
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert configuration("sblu_fwd", 100, "", GPU, launched.append) == FASTEST


def test_nothing_fits(search, monkeypatch):
    _, launched = search
    monkeypatch.setattr(configurations, "CANDIDATES", (Configuration(64, 8, 3),))
    monkeypatch.setitem(DEFAULTS, ("sblu_fwd", "small"), Configuration(16, 8, 1))
    assert configuration("sblu_fwd", 100, "", GPU, launched.append) == Configuration(16, 8, 1)


@pytest.mark.parametrize("text", ["{", "[]", '{"key": {"tokens": 16}}'])
def test_a_broken_cache_is_named_and_replaced(search, text, caplog):
    file, launched = search
    file.parent.mkdir()
    file.write_text(text)
    with caplog.at_level(logging.WARNING, logger="aape_kernels"):
        assert configuration("sblu_fwd", 100, "", GPU, launched.append) == FASTEST
    assert "autotune.json cannot be read and is searched anew" in caplog.text
    assert len(json.loads(file.read_text())) == 1


def test_a_cache_that_cannot_be_written_costs_only_the_search(search, caplog):
    file, launched = search
    file.parent.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="aape_kernels"):
        assert configuration("sblu_fwd", 100, "", GPU, launched.append) == FASTEST
    assert "autotune.json cannot be written" in caplog.text
