"""Two processes that share a model's parameters against one that has them all."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import ssl_case
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_training import StopAt, StoppedError, assert_same_bits, logged
from torch.distributed.fsdp import FSDPModule

from aape_ssl._lightning import Callback, CSVLogger, FSDPStrategy, ModelParallelStrategy, TensorBoardLogger
from aape_ssl.method.diagnostics import branch_ratio
from aape_ssl.method.model import Encoder
from aape_ssl.saved.checkpoints import load_encoder
from aape_ssl.training import sharding
from aape_ssl.training.monitor import TAG, Monitor, first_attention
from aape_ssl.training.pretraining import NonFiniteError, PretrainingModule

LOG = Path("csv", "version_0")
LOOSE = {"rtol": 1e-3, "atol": 1e-5}
"""For weights after AdamW's steps, whose first divide by gradients of the size of rounding errors."""


def fitted(
    folder: Path, devices: int, *callbacks: Callback, strategy: str = "", resume=None, precision=None, **options
) -> PretrainingModule:
    """Four steps with the global batch of one process; other initial weights on each, as only the first's count."""
    module = ssl_case.module(seed=dist.get_rank() if devices > 1 else 0, **options)
    trainer = ssl_case.trainer(
        folder,
        steps=4,
        devices=devices,
        strategy=strategy or ("sharded" if devices > 1 else "auto"),
        callbacks=[Monitor(2), *callbacks],
        logger=[CSVLogger(folder, "csv", 0), TensorBoardLogger(folder, "board", 0)],
        gradient_clip_val=0.5,  # of a norm from 1.4 down to 0.5
        precision=precision,
        use_distributed_sampler=False,
    )
    data = ssl_case.Tensors(ssl_case.BATCH // devices)
    trainer.fit(module, data, ckpt_path=str(resume / "last.ckpt") if resume else None, weights_only=True)
    return module


def fit(*given, **options) -> None:  # its result crosses to another process, as a sharded module cannot
    fitted(*given, **options)


def checkpoint(folder: Path) -> dict:
    return torch.load(folder / "last.ckpt", weights_only=True)


def assert_close_weights(got: dict, expected: dict) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # bias of keys: softmax cancels it, so that its gradient is nothing but rounding errors
        of = [0, 2] if name.endswith("in_proj_bias") else slice(None)
        parts = [w.view(3, -1) if name.endswith("in_proj_bias") else w.view(1, -1) for w in (got[name], value)]
        torch.testing.assert_close(parts[0][of], parts[1][of], **LOOSE, msg=lambda m, name=name: f"{name}: {m}")


# --- the same run ---


def looked_at(module: PretrainingModule) -> tuple[torch.Tensor, float | None]:
    """What the monitor computes from whole parameters, of other clips."""
    objective, x = module.objective, torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    masks = module.masks(torch.arange(3), (4, 4), 0)
    with sharding.gathered(objective):
        return first_attention(objective, x, masks), branch_ratio(objective.student.stem, x)


def fit_and_look(*given, **options):
    torch._dynamo.utils.counters.clear()  # of other tests, before the fork
    module = fitted(*given, **options)
    seen = looked_at(module)
    parts = module.objective.student, module.objective.teacher, module.objective.predictor
    assert all(isinstance(layer, FSDPModule) for part in parts for layer in part.layers)
    held = sum(parameter.to_local().numel() for parameter in module.parameters())
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return held, sum(parameter.numel() for parameter in module.parameters()), graphs, seen


def compile_eagerly(monkeypatch) -> None:
    """One graph a layer, and no compiler."""
    compile_function = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compile_function(f, backend="eager", fullgraph=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [{}, {"stem": "aape-fixed"}, {"stem": "conv+mlp", "contrastive_weight": 0.0}, {"stem": "conv", "compile": True}],
    ids=["aape", "fixed filters", "without the contrastive term", "compiled"],
)
# dynamo hides it, which a test's filter undoes
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_two_processes_that_share_are_one(tmp_path, monkeypatch, options):
    """The losses to 1e-5, the weights, the optimiser's state, what is logged, and what the monitor sees."""
    compile_eagerly(monkeypatch)
    one, two = tmp_path / "one", tmp_path / "two"
    fit(one, 1, **{**options, "compile": False})
    processes = ssl_case.in_processes(tmp_path / "processes", fit_and_look, two, 2, **options)

    tolerances = {"train/loss": 1e-5, "train/lr": 1e-5, "train/ema_decay": 1e-5, "train/grad_norm": 1e-4}
    if "stem" not in options:
        tolerances["stem/encoder_grad_norm"] = 1e-4
    for name, rel in tolerances.items():
        assert logged(two / LOG, name) == pytest.approx(logged(one / LOG, name), rel=rel), name
    assert len(set(logged(one / LOG, "train/loss"))) == 4
    got, expected = checkpoint(two), checkpoint(one)
    assert_close_weights(got.pop("state_dict"), expected.pop("state_dict"))
    (got_state,), (expected_state,) = got.pop("optimizer_states"), expected.pop("optimizer_states")
    assert got_state["param_groups"] == expected_state["param_groups"]
    assert got_state["state"].keys() == expected_state["state"].keys()
    for number, state in expected_state["state"].items():
        for name, value in state.items():
            torch.testing.assert_close(got_state["state"][number][name], value, **LOOSE)
    loaders = [c.pop("loops")["fit_loop"]["state_dict"]["combined_loader"] for c in (got, expected)]
    assert loaders[0] == loaders[1]
    assert_same_bits(got, expected)

    whole = ssl_case.module(**{**options, "compile": False})
    whole.load_state_dict(checkpoint(two)["state_dict"])
    encoder = load_encoder(two / "last.ckpt")
    assert_same_bits(encoder.state_dict(), whole.objective.teacher.state_dict())
    attention, ratio = looked_at(whole)
    assert sum(held for held, *_ in processes) == processes[0][1]
    for held, in_all, graphs, (got_attention, got_ratio) in processes:
        assert bool(graphs) == options.get("compile", False)
        assert 0.4 < held / in_all < 0.6
        torch.testing.assert_close(got_attention, attention)
        assert got_ratio == pytest.approx(ratio)
    board = EventAccumulator(str(two / "board" / "version_0"), {"images": 0}).Reload()
    assert [image.step for image in board.Images(TAG)] == [2, 4]


@pytest.mark.slow
def test_in_bfloat16(tmp_path):
    """As close to float32 as one process in bfloat16 is."""
    fit(tmp_path / "float32", 1)
    ssl_case.in_processes(tmp_path / "processes", fit, tmp_path / "bfloat16", 2, precision="bf16-mixed")
    got, expected = (logged(tmp_path / name / LOG, "train/loss") for name in ("bfloat16", "float32"))
    assert got != expected
    assert got == pytest.approx(expected, rel=0.02)
    assert all(value.dtype != torch.bfloat16 for value in checkpoint(tmp_path / "bfloat16")["state_dict"].values())


# --- resuming ---


def fit_until_stopped(folder: Path, devices: int) -> None:
    with pytest.raises(StoppedError):
        fit(folder, devices, StopAt(3))  # the checkpoint is that of step 2


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 2), (1, 2), (2, 1)])
def test_resumed_with_as_many_processes_or_others(tmp_path, first, then):
    def on(devices: int, function, *given, **options) -> None:
        if devices == 1:
            function(*given, devices, **options)
        else:
            ssl_case.in_processes(
                tmp_path / f"{function.__name__} {given[0].name}", function, *given, devices, **options
            )

    on(first, fit_until_stopped, tmp_path / "stopped")
    assert checkpoint(tmp_path / "stopped")["global_step"] == 2
    on(then, fit, tmp_path / "resumed", resume=tmp_path / "stopped")
    on(then, fit, tmp_path / "whole")
    assert logged(tmp_path / "resumed" / LOG, "train/loss") == pytest.approx(
        logged(tmp_path / "whole" / LOG, "train/loss")[2:], rel=1e-5
    )
    got, expected = (checkpoint(tmp_path / name) for name in ("resumed", "whole"))
    if first == then:
        assert_same_bits(got["state_dict"], expected["state_dict"])
        assert_same_bits(got["optimizer_states"], expected["optimizer_states"])
    else:
        assert_close_weights(got["state_dict"], expected["state_dict"])


def fit_as_another_run(folder: Path, resume: Path) -> str:
    with pytest.raises(ValueError, match=r"size: the checkpoint was made with") as caught:
        fit(folder, 2, resume=resume, size=(32, 1, 2))
    return str(caught.value)


def test_resuming_as_another_run_is_refused(tmp_path):
    """Before its weights are looked at, which would not fit."""
    fit(tmp_path / "one", 1)
    messages = ssl_case.in_processes(tmp_path / "processes", fit_as_another_run, tmp_path / "other", tmp_path / "one")
    assert messages == ["size: the checkpoint was made with (16, 1, 2), this run has (32, 1, 2)"] * 2


def fit_twice(folder: Path) -> list[torch.Tensor]:
    module = fitted(folder / "first", 2)
    trainer = ssl_case.trainer(folder, steps=1, devices=2, strategy="sharded", use_distributed_sampler=False)
    before = [sharding.whole(p).detach().clone() for p in module.parameters()]
    trainer.fit(module, ssl_case.Tensors(2))
    return [torch.stack([b, sharding.whole(p).detach()]) for b, p in zip(before, module.parameters(), strict=True)]


def test_another_fit_of_the_same_module(tmp_path):
    """Goes on with its weights."""
    for pairs in ssl_case.in_processes(tmp_path / "processes", fit_twice, tmp_path):
        moved = [float((after - before).abs().max()) for before, after in pairs]
        assert 0 < max(moved) < 0.011  # the learning rate is 0.01


# --- what stops a run ---


class PoisonOfOne(Callback):
    """A loss that is no number, of the second process alone and with a gradient that is one."""

    def setup(self, trainer, pl_module, stage):
        forward = pl_module.objective.forward

        def poisoned(*given):
            terms = forward(*given)
            bad = dist.get_rank() == 1 and trainer.global_step == 2
            return terms._replace(loss=terms.loss + math.inf) if bad else terms

        pl_module.objective.forward = poisoned


def fit_poisoned(folder: Path, strategy: str) -> str:
    with pytest.raises(NonFiniteError) as caught:
        fit(folder, 2, PoisonOfOne(), strategy=strategy)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_all_processes_stop_together(tmp_path, strategy):
    """Otherwise one would wait for the other."""
    first, second = ssl_case.in_processes(tmp_path / "processes", fit_poisoned, tmp_path / "run", strategy)
    assert first == "optimiser step 2: a loss of another process is no number"
    assert second.startswith("optimiser step 2, micro-batch 0: loss inf, regression ")


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_shard_in_another_way_are_refused(strategy):
    module = ssl_case.module()
    module.trainer = SimpleNamespace(strategy=strategy())
    with pytest.raises(ValueError, match=rf"expected 'sharded' .*ModelParallelStrategy.*, got {strategy.__name__}$"):
        module.configure_model()
    assert isinstance(module.objective.student, Encoder)
