"""Rows of the table: a pre-training step by stem, and the loader beside training. On a CPU; needs the extra ssl."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from aape_kernels.backends import Call, reasons

from .measure import Session, spread

# looked for, not imported: torchaudio's own import fails beside a CPU build of torch
MISSING = [name for name in ("soundfile", "soxr", "torchaudio", "yaml") if find_spec(name) is None]
if MISSING:
    pytest.skip(f"needs {', '.join(MISSING)} (the extra ssl)", allow_module_level=True)

import numpy as np  # noqa: E402
import soundfile  # noqa: E402
import soxr  # noqa: E402
import yaml  # noqa: E402

import aape_ssl  # noqa: E402
from aape_ssl.demo.command import bundled_clips  # noqa: E402
from aape_ssl.method.masks import MaskSampler  # noqa: E402
from aape_ssl.method.model import Encoder, Predictor, StemName  # noqa: E402
from aape_ssl.method.objective import Pretraining  # noqa: E402
from aape_ssl.sound.audio import AUDIOSET128, SAMPLE_RATE  # noqa: E402
from aape_ssl.sound.loader import ClipLoader, Crops  # noqa: E402
from aape_ssl.sound.sources import find  # noqa: E402

LAPTOP = yaml.safe_load((Path(aape_ssl.__file__).parent / "training" / "presets" / "laptop.yaml").read_text())
BATCH, FRAMES = (LAPTOP["data"]["init_args"][name] for name in ("batch_size", "frames"))
MASKS = MaskSampler(**LAPTOP["model"]["masks"])
MODELS: dict[str, dict[str, Any]] = {
    "laptop": LAPTOP["model"],
    # a deep and narrow one, with the rest as `PretrainingModule` has it
    "tiny": {"size": "tiny", "predictor_depth": 2, "predictor_heads": 6, "top_layers": 8},
}
STEMS: tuple[StemName, ...] = ("conv", "aape", "conv+mlp")
CACHED = 4  # batches
MIN_ROUNDS, MAX_ROUNDS = 9, 60
SECONDS = 30  # of timing a model's steps

CLIPS = 384  # 12 batches
CLIP_SECONDS = 2
WORKERS = 2
LOADER_ROUNDS = 9
STEPS = 4  # of training, beside an epoch of loading

AAPE_LIMIT = 0.95  # of the plain stem's samples/s, at the least
LOADER_LIMIT = 2.0  # times training's samples/s, at the least

Step = Callable[[], None]


def backend() -> str:
    """The one that "auto" would take, by its name."""
    chances = reasons(Call("embed", torch.device("cpu"), torch.float32))
    return next(name for name, why in chances.items() if why is None)


def training(name: str, stem: StemName) -> Step:
    """A step of one model on cached random batches: forward, backward, AdamW, the teacher's update.

    The model's and the batches' random numbers are the same for every stem.
    """
    options = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Encoder(options["size"], stem, stem_options={"backend": backend()} if stem == "aape" else None)
        predictor = Predictor(encoder.size.dim, depth=options["predictor_depth"], heads=options["predictor_heads"])
        objective = Pretraining(encoder, predictor, top_layers=options["top_layers"])
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    generator = torch.Generator().manual_seed(0)
    index = torch.arange(BATCH)
    batches = []
    for n in range(CACHED):
        x = torch.randn(BATCH, 1, AUDIOSET128.mel_bins, FRAMES, generator=generator)
        batches.append((x, MASKS(index, encoder.grid(x), n)))
    endless = itertools.cycle(batches)

    def step() -> None:
        x, masks = next(endless)
        optimizer.zero_grad()
        loss = objective(x, masks, index).loss
        loss.backward()
        optimizer.step()
        objective.update_teacher()
        assert loss.isfinite()

    return step


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(benchmark: Any, seconds: float, rounds: tuple[int, int], run: Callable[[int], None]) -> int:
    """`run` with the number of a round, as often as fit in `seconds`, without garbage collection; how often.

    It gets −1 first, for the round that warms up and is not to be counted.
    """
    estimate = timed(lambda: run(-1))
    count = min(max(rounds[0], round(seconds / estimate)), rounds[1])
    numbers = itertools.count()
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(lambda: run(next(numbers)), rounds=count)
    finally:
        gc.enable()
    return count


@pytest.fixture(autouse=True)
def _on_a_cpu(session: Session) -> None:
    if session.device.type != "cpu":
        pytest.skip("the pre-training rows are a CPU's")


@pytest.mark.parametrize("model", MODELS)
def test_training_step(benchmark: Any, model: str) -> None:
    """One step of every stem a round, each in its turn the first; rates relative to the plain stem's of that round."""
    steps = {stem: training(model, stem) for stem in STEMS}
    taken: dict[StemName, list[float]] = {stem: [] for stem in STEMS}

    def run(number: int) -> None:
        first = number % len(STEMS)
        for stem in STEMS[first:] + STEMS[:first]:
            seconds = timed(steps[stem])
            if number >= 0:
                taken[stem].append(seconds)

    benchmark.group = "pre-training step"
    rounds = interleaved(benchmark, SECONDS, (MIN_ROUNDS, MAX_ROUNDS), run)
    if benchmark.stats is None:  # --benchmark-disable
        return
    size = Encoder(MODELS[model]["size"], "conv").size
    benchmark.extra_info.update(
        op="training step",
        case=f"{model}: D = {size.dim}, {size.depth} layers, batch {BATCH} × {AUDIOSET128.mel_bins} × {FRAMES}, "
        f"{MASKS.num_masks} masks",
        batch=BATCH,
        rows=[
            {
                "stem": f"AaPE, {backend()}" if stem == "aape" else stem,
                "limit": AAPE_LIMIT if stem == "aape" else None,
                "seconds": spread(times),
                "ratio": spread([plain / mine for plain, mine in zip(taken["conv"], times, strict=True)]),
            }
            for stem, times in taken.items()
        ],
        rounds=rounds,
    )


def write_clips(folder: Path, rate: int) -> None:
    """The clips that come along, each as long as `CLIP_SECONDS`, under many names."""
    for number, path in zip(range(CLIPS), itertools.cycle(bundled_clips()), strict=False):
        samples, own_rate = soundfile.read(path)
        samples = np.resize(soxr.resample(samples, own_rate, rate), CLIP_SECONDS * rate)
        soundfile.write(folder / f"{number:03}.wav", samples, rate)


@pytest.mark.parametrize("rate", [SAMPLE_RATE, 44_100])
def test_loader(benchmark: Any, tmp_path: Path, rate: int) -> None:
    """A round: an epoch from the loader alone, then steps on cached batches alone. 44.1 kHz has to be resampled."""
    write_clips(tmp_path, rate)
    loader = ClipLoader(Crops(find(tmp_path), AUDIOSET128, FRAMES), BATCH, workers=WORKERS)
    step = training("laptop", "aape")
    loading: list[float] = []
    stepping: list[float] = []

    def run(number: int) -> None:
        epoch = timed(lambda: sum(1 for _ in loader))
        steps = [timed(step) for _ in range(STEPS)]
        if number >= 0:
            loading.append(epoch / (len(loader) * BATCH))
            stepping.append(sum(steps) / (STEPS * BATCH))

    benchmark.group = "loader"
    try:
        rounds = interleaved(benchmark, 0, (LOADER_ROUNDS, LOADER_ROUNDS), run)
    finally:
        loader.close()
    if benchmark.stats is None:  # --benchmark-disable
        return
    benchmark.extra_info.update(
        op="loader",
        clips=f"{CLIPS} wav of {CLIP_SECONDS} s, {rate / 1000:g} kHz",
        workers=WORKERS,
        case=f"batch {BATCH} × {AUDIOSET128.mel_bins} × {FRAMES}, training: laptop, AaPE, {backend()}",
        seconds=spread(loading),  # a clip
        training_seconds=spread(stepping),
        ratio=spread([train / load for train, load in zip(stepping, loading, strict=True)]),
        limit=LOADER_LIMIT,
        rounds=rounds,
    )
