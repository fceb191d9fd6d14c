"""A tiny pre-training on tensors, for the tests, also in processes of its own, and one that kills itself."""

import multiprocessing.connection
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from aape_ssl._lightning import LightningDataModule, Trainer
from aape_ssl.method.masks import MaskSampler
from aape_ssl.saved import checkpoints
from aape_ssl.saved.checkpoints import AtomicCheckpointIO, LastCheckpoint
from aape_ssl.training.pretraining import PretrainingModule

CLIPS, BATCH = 12, 4


class Loader:
    """Shuffled by epoch, with its place as its state."""

    def __init__(self, batch: int = BATCH, rank: int = 0, world: int = 1) -> None:
        self.x = torch.randn(CLIPS, 1, 16, 16, generator=torch.Generator().manual_seed(0))
        self.batch, self.rank, self.world = batch, rank, world
        self.epoch, self.given, self.resumed = -1, 0, False

    def __len__(self) -> int:
        return CLIPS // (self.batch * self.world)

    def __iter__(self):
        if not (self.resumed and self.given < len(self)):
            self.epoch, self.given = self.epoch + 1, 0
        self.resumed = False
        order = torch.randperm(CLIPS, generator=torch.Generator().manual_seed(self.epoch))
        while self.given < len(self):
            index = order.split(self.batch * self.world)[self.given].chunk(self.world)[self.rank]
            self.given += 1
            yield {"log_mel": self.x[index], "index": index}

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.given, self.resumed = state["epoch"], state["given"], True


class Tensors(LightningDataModule):
    def __init__(self, batch: int = BATCH) -> None:
        super().__init__()
        self.batch = batch

    def train_dataloader(self) -> Loader:
        return Loader(self.batch, self.trainer.global_rank, self.trainer.world_size)


def module(seed: int = 0, **options) -> PretrainingModule:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tiny = {"size": (16, 1, 2), "patch_size": 4, "predictor_depth": 1, "predictor_heads": 2, "projection_dim": 8}
        tiny |= {"masks": MaskSampler(num_masks=2, kind="random"), "ema": (0.9, 0.99), "ema_steps": 10, "lr": 1e-2}
        return PretrainingModule(**{**tiny, "warmup_steps": 2, **options})


def trainer(folder: Path, steps: int = 9, accumulate: int = 1, every: int = 2, callbacks=(), **options) -> Trainer:
    options = {"logger": False, "gradient_clip_val": 1.0, "log_every_n_steps": 1, "accelerator": "cpu"} | options
    return Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        callbacks=[LastCheckpoint(folder, every), *callbacks],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )


def last_checkpoint(folder: Path) -> dict:
    """What it says of the run: of Lightning's loops only the loader's place."""
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    (checkpoint["loader"],) = checkpoint.pop("loops")["fit_loop"]["state_dict"]["combined_loader"]
    return checkpoint


def assert_same_bits(got, expected, where: str = "checkpoint") -> None:
    assert type(got) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert torch.equal(got, expected), where
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        for key in expected:
            assert_same_bits(got[key], expected[key], f"{where}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(got) == len(expected), where
        for i, pair in enumerate(zip(got, expected, strict=True)):
            assert_same_bits(*pair, f"{where}/{i}")
    else:
        assert got == expected, where


def run(folder: Path, accumulate: int = 1, resume: bool = False, **options) -> dict:
    """Train to the end, and what the last checkpoint then says of the run."""
    last = str(folder / "last.ckpt") if resume else None
    # other initial weights when resuming: they must not matter
    model = module(seed=int(resume))
    trainer(folder, accumulate=accumulate, **options).fit(model, Tensors(), ckpt_path=last, weights_only=True)
    return last_checkpoint(folder)


def in_a_process(function: Callable, *given) -> int:
    """What a process ends with that does nothing but `function`: its exit status, or less than 0, a signal's number.

    Forked, as the next ones: a new interpreter would import for seconds what is imported here.
    """
    process = multiprocessing.get_context("fork").Process(target=function, args=given)
    process.start()
    process.join(120)
    process.kill()
    process.join()
    return process.exitcode


def in_processes(folder: Path, function: Callable, *given, **options) -> list:
    """What `function` returns in each of two processes of one group; none of them is left behind.

    They meet by a file, not a port, which another test might have. Forked: a spawned process would unpickle
    lightning's objects first, which import a torchvision not yet mended.
    """
    folder.mkdir(parents=True)

    def process(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)  # for lightning: somebody else has started the processes
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
        torch.save(function(*given, **options), folder / f"{rank}.pt")
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=process, args=(rank,)) for rank in range(2)]
    try:
        for each in processes:
            each.start()
        end = time.monotonic() + 120
        # one that has failed may leave the other waiting
        while (running := [each for each in processes if each.exitcode is None]) and time.monotonic() < end:
            if any(each.exitcode for each in processes):
                end = min(end, time.monotonic() + 5)
            multiprocessing.connection.wait([each.sentinel for each in running], timeout=1)
        assert [each.exitcode for each in processes] == [0, 0]
    finally:
        for each in processes:
            each.kill()
            each.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def die_at(moment: str) -> None:
    """SIGKILL in step 5, in the middle of writing the checkpoint of step 4, or before that replaces the one before."""

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    counted = {"torch.save": 0, "os.replace": 0}

    def counting(name, original):
        def call(*args, **kwargs):
            counted[name] += 1
            if counted[name] == 2:
                if name == "torch.save":
                    args[1].write(b"PK\x03\x04 half a checkpoint")
                    args[1].flush()
                die()
            return original(*args, **kwargs)

        return call

    if moment == "in a step":
        step = PretrainingModule.on_before_optimizer_step

        def hook(self, optimizer):
            return die() if self.global_step == 5 else step(self, optimizer)

        PretrainingModule.on_before_optimizer_step = hook
    elif moment == "while writing":
        checkpoints.torch.save = counting("torch.save", torch.save)
    else:
        checkpoints.os.replace = counting("os.replace", os.replace)


def killed(folder: Path, accumulate: int, moment: str) -> None:
    """Runs until it dies."""
    die_at(moment)
    run(folder, accumulate)
