"""Pre-training under Lightning: the same bits after SIGKILL, the teacher's steps, and what stops a run."""

import csv
import errno
import math
import re
import resource
import signal
from pathlib import Path

import pytest
import ssl_case
import torch
from ssl_case import assert_same_bits
from torch import nn

from aape_ssl._lightning import Callback, CSVLogger
from aape_ssl.method import objective
from aape_ssl.saved.checkpoints import AtomicCheckpointIO, CheckpointError, load_encoder
from aape_ssl.saved.pretrained import AudioEncoder
from aape_ssl.training import pretraining as training


class StoppedError(Exception):
    pass


class StopAt(Callback):
    """Ends a run after a step, like an exception in it would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            raise StoppedError


# --- the same bits ---


@pytest.mark.parametrize(
    ("accumulate", "moment", "last"),
    [(1, "in a step", 4), (2, "in a step", 4), (1, "while writing", 2), (2, "before it is replaced", 2)],
)
def test_killed_and_resumed_is_never_interrupted(tmp_path, accumulate, moment, last):
    (tmp_path / "killed").mkdir()
    assert ssl_case.in_a_process(ssl_case.killed, tmp_path / "killed", accumulate, moment) == -signal.SIGKILL
    assert torch.load(tmp_path / "killed" / "last.ckpt", weights_only=True)["global_step"] == last
    resumed = ssl_case.run(tmp_path / "killed", accumulate, resume=True)
    assert_same_bits(resumed, ssl_case.run(tmp_path / "whole", accumulate))
    assert [path.name for path in (tmp_path / "killed").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_interrupted_after_every_step_is_never_interrupted(tmp_path, accumulate):
    """Once, or before every step: at both ends of an epoch and in its middle."""
    whole = ssl_case.run(tmp_path / "whole", accumulate)
    for step in range(1, 9):
        for folder in (tmp_path / str(step), tmp_path / "every step"):
            with pytest.raises(StoppedError):
                ssl_case.run(folder, accumulate, folder.is_dir(), every=1, callbacks=[StopAt(step)])
            if folder.name != "every step" or step == 8:
                assert_same_bits(ssl_case.run(folder, accumulate, resume=True), whole)


def test_global_generators_do_not_matter(tmp_path):
    whole = ssl_case.run(tmp_path / "one")
    torch.manual_seed(1)
    assert_same_bits(ssl_case.run(tmp_path / "other"), whole)


def test_resuming_as_another_run_is_refused(tmp_path):
    ssl_case.run(tmp_path)
    with pytest.raises(ValueError, match=r"lr: the checkpoint was made with 0.01, this run has 0.1"):
        ssl_case.trainer(tmp_path).fit(
            ssl_case.module(lr=0.1), ssl_case.Tensors(), ckpt_path=str(tmp_path / "last.ckpt"), weights_only=True
        )


# --- steps ---


def logged(folder: Path, name: str) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


def losses(folder: Path) -> list[float]:
    return logged(folder, "train/loss")


class Record(Callback):
    """Learning rate and teacher at every optimiser step."""

    def __init__(self) -> None:
        self.rates, self.students, self.micro_batches = [], [], 0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.micro_batches += 1
        if len(self.students) < trainer.global_step:
            self.students.append([p.detach().clone() for p in pl_module.objective.student.parameters()])


def test_the_teacher_moves_once_an_optimiser_step(tmp_path):
    """With accumulation 2: 21 updates for 21 steps, each towards the student after its step."""
    record, module = Record(), ssl_case.module()
    teacher = [p.clone() for p in module.objective.teacher.parameters()]
    ssl_case.trainer(tmp_path, steps=21, accumulate=2, callbacks=[record]).fit(module, ssl_case.Tensors())
    assert record.micro_batches == 32  # 3 an epoch, the last of which is a step by itself
    assert int(module.objective.updates) == len(record.students) == 21
    for step, student in enumerate(record.students):
        decay = 0.9 + 0.09 * min(step / 10, 1)
        teacher = [decay * t + (1 - decay) * s for t, s in zip(teacher, student, strict=True)]
    for got, expected in zip(module.objective.teacher.parameters(), teacher, strict=True):
        torch.testing.assert_close(got, expected)


class RecordMasks(Callback):
    def __init__(self) -> None:
        self.drawn = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.drawn.append((batch["index"], outputs["masks"]))


def test_masks_are_drawn_by_step_and_micro_batch(tmp_path):
    record = RecordMasks()
    module = ssl_case.module()
    ssl_case.trainer(tmp_path, steps=4, accumulate=2, callbacks=[record]).fit(module, ssl_case.Tensors())
    keys = [(0, 0), (0, 1), (1, 0), (2, 0), (2, 1), (3, 0)]  # 3 batches an epoch
    for (index, masks), (step, micro_batch) in zip(record.drawn, keys, strict=True):
        assert torch.equal(masks.visible, module.masks(index, (4, 4), step, micro_batch).visible)


def test_learning_rate(tmp_path):
    record = Record()
    ssl_case.trainer(tmp_path, steps=6, accumulate=2, callbacks=[record]).fit(ssl_case.module(), ssl_case.Tensors())
    cosine = [0.5 * (1 + math.cos(math.pi * done / 4)) for done in range(4)]
    assert record.rates == pytest.approx([0.01 * share for share in (0.5, 1.0, *cosine)])


def test_epochs_beside_a_schedule_over_steps_are_warned_of(tmp_path):
    with pytest.warns(UserWarning, match="max_epochs: the learning rate rises and falls over max_steps, 9, also where"):
        ssl_case.trainer(tmp_path, max_epochs=1).fit(ssl_case.module(), ssl_case.Tensors())


def test_what_decays(tmp_path):
    module = ssl_case.module()
    ssl_case.trainer(tmp_path, steps=1).fit(module, ssl_case.Tensors())
    decayed, exempt = ({id(p) for p in group["params"]} for group in module.trainer.optimizers[0].param_groups)
    for name, parameter in module.objective.named_parameters():
        expected = (
            set()
            if name.startswith("teacher.")
            else {"exempt"}
            if name.endswith(("bias", "mask_token", "encoder.b1", "encoder.b2")) or ".norm" in name
            else {"decayed"}
        )
        assert {kind for kind, of in (("decayed", decayed), ("exempt", exempt)) if id(parameter) in of} == expected, (
            name
        )


@pytest.mark.parametrize(
    "options", [{}, {"stem": "aape-fixed"}, {"stem": "conv"}, {"stem": "conv+mlp"}, {"precision": "bf16-mixed"}]
)
def test_it_learns(tmp_path, options):
    """The prediction of the masked tokens of twelve clips gets better than their mean, which is 1."""
    of_trainer = {name: options.pop(name) for name in ["precision"] if name in options}
    module = ssl_case.module(**options, warmup_steps=20)
    trainer = ssl_case.trainer(tmp_path, steps=220, every=220, **of_trainer)
    trainer.fit(module, ssl_case.Tensors())
    assert trainer.callback_metrics["train/regression"] < 0.9


@pytest.mark.parametrize("part", ["teacher", "student"])
def test_the_encoder_of_a_checkpoint(tmp_path, part):
    module = ssl_case.module(stem_options={"num_states": 3})
    ssl_case.trainer(tmp_path, steps=2).fit(module, ssl_case.Tensors())
    x = torch.randn(2, 1, 16, 24)
    encoder = load_encoder(tmp_path / "last.ckpt", part)
    with torch.no_grad():
        assert torch.equal(encoder(x), getattr(module.objective, part).eval()(x))
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"other.pt: expected a checkpoint of pre-training with a {part}"):
        load_encoder(tmp_path / "other.pt", part)
    with pytest.raises(CheckpointError, match=r"last.ckpt: expected to find which front end it was made with"):
        AudioEncoder.from_checkpoint(tmp_path / "last.ckpt", part)  # its data were not ClipData's


def as_before_features(path: Path) -> None:
    """A checkpoint of a "complex" stem as the first release wrote it: its options do not say so."""
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["options"]["stem_options"].pop("features") == "complex"
    for name in list(checkpoint["state_dict"]._metadata):
        checkpoint["state_dict"]._metadata[name].pop("version", None)
    torch.save(checkpoint, path)


@pytest.mark.parametrize("stem", ["aape", "conv+mlp"])
def test_checkpoints_from_before_features(tmp_path, stem):
    """They give the tokens they gave, resume to the same bits as "complex" stems, and are refused as others."""
    options = {"stem": stem, "stem_options": {"num_states": 3}}
    named = {"stem": stem, "stem_options": {"num_states": 3, "features": "complex"}}

    def fit(folder: Path, options: dict, steps: int = 9) -> dict:
        last = folder / "last.ckpt"
        ssl_case.trainer(folder, steps, callbacks=[StopAt(4)] if not last.exists() and steps == 9 else []).fit(
            ssl_case.module(**options),
            ssl_case.Tensors(),
            ckpt_path=str(last) if last.exists() else None,
            weights_only=True,
        )
        return ssl_case.last_checkpoint(folder)

    with pytest.raises(StoppedError):
        fit(tmp_path / "old", named)
    x, path = torch.randn(2, 1, 16, 24), tmp_path / "old" / "last.ckpt"
    before = load_encoder(path)(x)
    as_before_features(path)
    assert torch.equal(load_encoder(path)(x), before)
    with pytest.raises(ValueError, match=r"stem_options: the checkpoint was made with .*'complex'.*, this run") as e:
        fit(tmp_path / "old", options)
    assert "\n" not in str(e.value)
    ssl_case.trainer(tmp_path / "whole").fit(ssl_case.module(**named), ssl_case.Tensors())
    assert_same_bits(fit(tmp_path / "old", named), ssl_case.last_checkpoint(tmp_path / "whole"))


def test_old_exported_encoders_give_the_tokens_they_gave(tmp_path):
    x, size = torch.randn(2, 1, 128, 32), (16, 1, 2)
    encoder = AudioEncoder(size, "aape", stem_options={"features": "complex"}).eval()
    encoder.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"features": "complex"', ""))
    torch.testing.assert_close(AudioEncoder.from_pretrained(tmp_path).eval()(x), encoder(x))


def test_fixed_filters_stay(tmp_path):
    """Through training, the teacher's average, an interruption and what is read of the checkpoint."""
    options = {"stem": "aape-fixed", "stem_options": {"num_states": 3}, "weight_decay": 0.5}
    start = ssl_case.module(**options).objective.student.stem.state_dict()
    ssl_case.trainer(tmp_path / "whole").fit(ssl_case.module(**options), ssl_case.Tensors())
    for callbacks in ([StopAt(4)], []):
        last = tmp_path / "parts" / "last.ckpt"
        trainer = ssl_case.trainer(tmp_path / "parts", callbacks=callbacks)
        given = {"ckpt_path": str(last) if last.exists() else None, "weights_only": True}
        if callbacks:
            with pytest.raises(StoppedError):
                trainer.fit(ssl_case.module(**options), ssl_case.Tensors(), **given)
        else:
            trainer.fit(ssl_case.module(**options), ssl_case.Tensors(), **given)
    whole, parts = (ssl_case.last_checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert_same_bits(parts, whole)
    for part in ("student", "teacher"):
        stem = load_encoder(tmp_path / "parts" / "last.ckpt", part).stem
        for name, value in stem.state_dict().items():
            assert torch.equal(value, start[name]) == name.startswith("encoder."), name
        assert not stem.encoder.w2.any()
        assert not stem.encoder.w1.requires_grad


def test_compiled(tmp_path, monkeypatch):
    """Traced as one graph, and run without a compiler: the same losses, and checkpoints from which either goes on."""
    compile_module, compiled = nn.Module.compile, []

    def compile_eagerly(module: nn.Module) -> None:
        compile_module(module, backend="eager", fullgraph=True)
        compiled.append(module)

    def fit(name: str, compile: bool, *callbacks: Callback, resume: str | None = None) -> None:  # noqa: A002
        logger = CSVLogger(tmp_path, name=None, version=name)
        trainer = ssl_case.trainer(tmp_path / name, steps=4, logger=logger, callbacks=callbacks)
        module, before = ssl_case.module(compile=compile), len(compiled)
        trainer.fit(module, ssl_case.Tensors(), ckpt_path=resume, weights_only=True)
        assert compiled[before:] == [module.objective] * compile

    monkeypatch.setattr(nn.Module, "compile", compile_eagerly)
    fit("plain", False)
    fit("compiled", True)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    for compiled_first in (False, True):
        name = f"compiled {'first' if compiled_first else 'then'}"
        with pytest.raises(StoppedError):
            fit(f"{name}, stopped", compiled_first, StopAt(3))  # the checkpoint is that of step 2
        fit(name, not compiled_first, resume=str(tmp_path / f"{name}, stopped" / "last.ckpt"))
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "plain")[2:], rel=1e-5)


class RecordTerms(Callback):
    """Loss, regression, contrastive and agreement."""

    def __init__(self) -> None:
        self.terms = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        assert all(term.dtype == torch.float32 for term in outputs["terms"][:4])
        self.terms.append(torch.stack(outputs["terms"][:4]).detach())


def fits_bfloat16(values: torch.Tensor) -> bool:
    return torch.equal(values.bfloat16().to(values), values)


def test_bfloat16(tmp_path, monkeypatch):
    """Student and teacher compute in bfloat16; targets, loss and the teacher's weights are of float32's precision."""
    seen = []

    def record(layers):
        seen.append((layers, targets(layers)))
        return seen[-1][1]

    targets = objective.normalised_targets
    monkeypatch.setattr(objective, "normalised_targets", record)
    steps, teachers = {}, {}
    for precision in ("32-true", "bf16-mixed"):
        module, records = ssl_case.module(), RecordTerms()
        start = [p.clone() for p in module.objective.teacher.parameters()]
        trainer = ssl_case.trainer(tmp_path / precision, steps=4, precision=precision, callbacks=[records])
        trainer.fit(module, ssl_case.Tensors())
        steps[precision], teachers[precision] = torch.stack(records.terms), module.objective.teacher
        moved = [not torch.equal(p, s) for p, s in zip(module.objective.teacher.parameters(), start, strict=True)]
        assert all(moved)
    got, expected = steps["bf16-mixed"], steps["32-true"]
    assert not torch.equal(got, expected)
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=0.02, atol=0)
    assert not any(fits_bfloat16(term) for term in got.T)
    for layers, of_layers in seen[len(seen) // 2 :]:
        torch.testing.assert_close(of_layers, targets([layer.float() for layer in layers]), rtol=0, atol=1e-6)
        assert not fits_bfloat16(of_layers)
    assert not any(fits_bfloat16(p) for p in teachers["bf16-mixed"].parameters())


def test_clipping_clips(tmp_path):
    """The gradient that reaches the optimiser is the logged one, scaled to the norm that was asked for."""
    gradients = {}
    for clip in (None, 0.1):
        module = ssl_case.module()
        trainer = ssl_case.trainer(tmp_path / str(clip), steps=1, gradient_clip_val=clip)
        trainer.fit(module, ssl_case.Tensors())
        gradients[clip] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
        norm = trainer.callback_metrics["train/grad_norm"]
        torch.testing.assert_close(norm, gradients[None].norm())
    assert norm > 0.2
    torch.testing.assert_close(gradients[0.1], gradients[None] * 0.1 / norm)


# --- what stops a run ---


class Poison(Callback):
    """A pixel of clip 7 that is no number, from optimiser step 5 on."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step >= 5:
            batch["log_mel"] = torch.where(batch["index"].view(-1, 1, 1, 1) == 7, math.nan, batch["log_mel"])


def test_a_loss_that_is_no_number_is_caught(tmp_path):
    """Before the optimiser's step, and named; the last good checkpoint goes on as if nothing had been."""
    module = ssl_case.module()
    with pytest.raises(training.NonFiniteError) as caught:
        ssl_case.trainer(tmp_path, callbacks=[Poison()]).fit(module, ssl_case.Tensors())
    step, loss, clips = str(caught.value).replace("micro-batch 0: ", "").replace("; ", ", ", 1).split(", ", 2)
    assert step in {"optimiser step 5", "optimiser step 6", "optimiser step 7"}, step  # whichever has clip 7
    assert loss == "loss nan"
    assert "7" in clips.split("clips ")[1].split(", ")
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    assert_same_bits(ssl_case.run(tmp_path, resume=True), ssl_case.run(tmp_path / "whole"))


def test_a_gradient_that_is_no_number_is_caught(tmp_path):
    module = ssl_case.module()
    module.objective.predictor.mask_token.register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(training.NonFiniteError, match=r"optimiser step 0: the norm of the gradient is (inf|nan)"):
        ssl_case.trainer(tmp_path).fit(module, ssl_case.Tensors())
    assert all(parameter.isfinite().all() for parameter in module.parameters())


def test_a_checkpoint_that_does_not_fit_on_the_disk(tmp_path):
    """The one before is kept, whole, and nothing else is left."""
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"state_dict": {"w": torch.ones(2)}}, path)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        with pytest.raises(
            CheckpointError, match=r"last.ckpt: the checkpoint could not be written .*; the one written"
        ):
            io.save_checkpoint({"state_dict": {"w": torch.ones(2**16)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_disk_that_is_full_is_named(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("aape_ssl.saved.checkpoints.os.fsync", full)
    with pytest.raises(
        CheckpointError, match=r"last.ckpt: .*could not be written \(OSError: .*No space left on device\)$"
    ):
        ssl_case.run(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "text", "other", "missing"])
def test_checkpoints_that_cannot_be_read(tmp_path, damage):
    path = tmp_path / "last.ckpt"
    if damage == "cut":
        ssl_case.run(tmp_path)
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "other":
        torch.save([torch.ones(2)], path)
    content = path.read_bytes() if path.exists() else None
    why = {"other": "expected a checkpoint, got a list", "missing": "no such checkpoint"}
    message = f"last.ckpt: {why.get(damage, 'the checkpoint cannot be read')}"
    with pytest.raises(CheckpointError, match=message) as caught:
        ssl_case.run(tmp_path, resume=True)
    assert "\n" not in str(caught.value)
    assert (path.read_bytes() if path.exists() else None) == content


@pytest.mark.parametrize("rates", [{"lr": True}, {"lr": None}, {"lr": math.inf}, {"betas": (0.9,)}])
def test_rates_that_are_none(rates):
    (name,) = rates
    with pytest.raises(ValueError, match=f"{name}: expected .* got {re.escape(str(rates[name]))}"):
        ssl_case.module(**rates)


def test_without_an_end_there_is_no_schedule(tmp_path):
    with pytest.raises(ValueError, match="max_steps: expected at least 1, at whose end the learning rate is 0, got -1"):
        ssl_case.trainer(tmp_path, steps=-1, max_epochs=2).fit(ssl_case.module(), ssl_case.Tensors())


# --- several processes ---


def test_two_processes_have_the_losses_of_one(tmp_path):
    """Four steps of DDP on gloo with half the batch each, to 1e-5."""
    # forked: a spawned process would unpickle lightning's objects first, which import a torchvision not yet mended
    for devices, strategy in ((1, "auto"), (2, "ddp_fork")):
        logger = CSVLogger(tmp_path, name=None, version=str(devices))
        ssl_case.trainer(
            tmp_path / strategy,
            steps=4,
            logger=logger,
            devices=devices,
            strategy=strategy,
            use_distributed_sampler=False,
        ).fit(ssl_case.module(lr=1e-3), ssl_case.Tensors(ssl_case.BATCH // devices))
    one, two = losses(tmp_path / "1"), losses(tmp_path / "2")
    assert len(one) == 4
    assert two == pytest.approx(one, rel=1e-5)
    assert len(set(one)) == 4


def fit_from_micro_batches(folder: Path, strategy: str, devices: int, accumulate: int) -> None:
    """Four clips a step, all of which have masks that do not depend on the micro-batch they come in."""
    module = ssl_case.module(contrastive_weight=0.0, lr=1e-3)
    masks = module.masks
    module.masks = lambda index, grid, step, micro_batch: masks(index, grid, step)
    ssl_case.trainer(
        folder,
        steps=4,
        accumulate=accumulate,
        logger=CSVLogger(folder, name=None, version="log"),
        devices=devices,
        strategy=strategy,
        use_distributed_sampler=False,
    ).fit(module, ssl_case.Tensors(4 // devices // accumulate))


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_two_processes_that_accumulate_have_the_gradients_of_one(tmp_path, strategy):
    """Two processes with two batches of one clip a step, against one with a batch of four."""
    fit_from_micro_batches(tmp_path / "one", "auto", 1, 1)
    ssl_case.in_processes(tmp_path / "processes", fit_from_micro_batches, tmp_path / "two", strategy, 2, 2)
    one, two = (logged(tmp_path / name / "log", "train/grad_norm") for name in ("one", "two"))
    assert len(set(one)) == 4
    assert two == pytest.approx(one, rel=1e-5)
    got, expected = (torch.load(tmp_path / name / "last.ckpt", weights_only=True) for name in ("two", "one"))
    weights = {name: value for name, value in expected["state_dict"].items() if not name.endswith("in_proj_bias")}
    for name, value in weights.items():  # all but those of keys, whose gradient softmax makes rounding errors
        torch.testing.assert_close(got["state_dict"][name], value, rtol=1e-3, atol=1e-5)
