"""`aape-ssl probe`, `embed`, `export` and `finetune` through their command line, on real clips."""

import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from oracle import relative_error
from safetensors import SafetensorError
from ssl_case import in_processes

from aape_ssl._lightning import Callback, Trainer
from aape_ssl.cli import main
from aape_ssl.demo import command as demo
from aape_ssl.evaluation import embedding
from aape_ssl.saved import checkpoints
from aape_ssl.saved.pretrained import AudioEncoder, load
from aape_ssl.sound import audio
from aape_ssl.sound.sources import Clip, write_manifest
from aape_ssl.training.finetuning import FinetuningModule, LabelledClips, mean_average_precision
from aape_ssl.training.runs import _one_line

FRAMES = 32
OPTIONS = {
    "model.size": "[16, 2, 2]",
    "model.predictor_heads": 2,
    "model.warmup_steps": 2,
    "data": "aape_ssl.sound.data.ClipData",
    "data.frames": FRAMES,
    "data.batch_size": 12,
    "data.workers": 0,
    "data.statistics": "data",
    "trainer.max_steps": 4,
}
TRAINER = {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "trainer.log_every_n_steps": 1}


def run(command: str, **options) -> int:
    given = {name.replace("__", "."): value for name, value in options.items()}
    return main([command, *(f"--{name}={value}" for name, value in given.items())])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """36 pieces of the clips that come along, in 3 folds; labelled by whether they are of a drum."""
    folder = tmp_path_factory.mktemp("sounds")
    clips = []
    for path in demo.bundled_clips():
        for piece in range(6):
            name = f"{path.stem}-{piece}.wav"
            waveform = audio.load(path, 0.4, at=piece / 5)
            soundfile.write(folder / name, waveform.numpy(), audio.SAMPLE_RATE)
            label = "drum" if path.stem.split("_")[0] in ("drum", "loop", "perc") else "other"
            clips.append(Clip(name, folder / name, label, str(piece % 3), f"{path.stem}-{piece}"))
    write_manifest(folder / "manifest.csv", clips)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def checkpoint(manifest, tmp_path_factory):
    out = tmp_path_factory.mktemp("pretrain")
    assert run("pretrain", **{**OPTIONS, **TRAINER, "data.data": manifest, "out": out}) == 0
    return out / "last.ckpt"


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "encoder"
    assert run("export", checkpoint=checkpoint, out=out) == 0
    return out


def test_export_loads_in_one_line_and_gives_the_teachers_tokens(checkpoint, exported):
    encoder = AudioEncoder.from_pretrained(exported)
    data = torch.load(checkpoint, weights_only=True)["ClipData"]
    assert (encoder.front_end.mean, encoder.front_end.std) == (data["mean"], data["std"])
    assert data["mean"] != audio.AUDIOSET128.mean  # they were measured
    assert encoder.frames == FRAMES
    assert not encoder.training
    x = encoder.log_mel(audio.load(demo.bundled_clips()[0], 1.0))
    with torch.no_grad():
        tokens = encoder.forward_features(x)
        assert torch.equal(tokens, checkpoints.load_encoder(checkpoint)(x))
        assert relative_error(encoder(x), embedding.pool(*encoder.tokens(x))) <= 1e-6
    assert tokens.shape == (1, 8 * 6, encoder.embed_dim) == (1, 48, 16)
    assert encoder(x).shape == (1, encoder.num_features) == (1, 8 * 16)
    assert encoder.no_weight_decay() <= dict(encoder.named_parameters()).keys()
    assert sorted(path.name for path in exported.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load(exported).config == json.loads(json.dumps(load(checkpoint).config))


def test_an_encoder_of_numpys_numbers_is_loaded_as_it_was(tmp_path):
    given = {"statistics": torch.tensor([-5.5, 3.0]), "frames": np.int64(64), "patch_size": np.int64(16)}
    encoder = AudioEncoder((np.int64(16), 1, 2), labels=dict.fromkeys("ab").keys(), **given).eval()
    encoder.save_pretrained(tmp_path / "model")
    again = AudioEncoder.from_pretrained(tmp_path / "model")
    assert again.front_end == encoder.front_end
    assert (again.frames, again.labels, again.config) == (64, ("a", "b"), encoder.config)
    waveform = torch.randn(16000)
    with torch.no_grad():
        assert torch.equal(again(again.log_mel(waveform)), encoder(encoder.log_mel(waveform)))


def test_an_exported_encoder_needs_nothing_of_what_trained_it(exported):
    code = (
        "import sys; sys.modules['lightning'] = sys.modules['jsonargparse'] = None;"
        "from aape_ssl.saved.pretrained import load; print(load(sys.argv[1]).embed_dim)"
    )
    done = subprocess.run([sys.executable, "-c", code, exported], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "16\n"), done.stderr


def test_export_of_the_student(checkpoint, tmp_path, exported):
    assert run("export", checkpoint=checkpoint, out=tmp_path / "student", part="student") == 0
    student, teacher = (load(path).state_dict() for path in (tmp_path / "student", exported))
    assert student.keys() == teacher.keys()
    assert any(not torch.equal(value, teacher[name]) for name, value in student.items())


def test_a_full_disk_is_one_line(checkpoint, tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_model", full)
    assert run("export", checkpoint=checkpoint, out=tmp_path / "encoder") == 2
    said = f"aape-ssl: {tmp_path / 'encoder'}: cannot be written (Error while serializing: I/O error: No space left"
    assert capsys.readouterr().err.startswith(said)
    assert not list(tmp_path.iterdir())


def test_embed(exported, manifest, tmp_path, capsys):
    (tmp_path / "bad.wav").write_text("no sound")
    shutil.copy(demo.bundled_clips()[0], tmp_path)
    out = tmp_path / "out.npz"
    assert run("embed", checkpoint=exported, data=tmp_path, out=out, level="frame", device="cpu") == 1
    said = capsys.readouterr()
    assert said.out.endswith("out.npz: 1 of 2 clips\n")
    assert said.err.startswith("aape-ssl: bad.wav: cannot be read as sound")
    encoder, waveform = load(exported), audio.load(demo.bundled_clips()[0])
    with np.load(out) as table, torch.no_grad():
        assert set(table["name"]) == {demo.bundled_clips()[0].name}
        x = encoder.log_mel(waveform)[..., :FRAMES]
        first = encoder.forward_features(x).view(8, 2, 16).transpose(0, 1).reshape(2, 128)
        np.testing.assert_allclose(table["embedding"][:2], first, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(table["time"][:2], [0.08, 0.24])
    before = out.read_bytes()
    assert run("embed", checkpoint=exported, data=manifest, out=out) == 2
    assert capsys.readouterr().err == f"aape-ssl: --out: {out} exists already\n"
    assert out.read_bytes() == before


def test_probe_beside_its_baselines(exported, checkpoint, manifest, tmp_path, capsys, monkeypatch):
    scores = tmp_path / "scores.csv"
    options = {"data": manifest, "cache": tmp_path}
    assert run("probe", checkpoint=exported, scores=scores, **options) == 0
    table = capsys.readouterr().out
    lines = table.splitlines()
    assert lines[0] == "36 clips, 2 classes, test clips 36"
    rows = [tuple(line.rsplit(maxsplit=7)[:3]) for line in lines[2:]]
    names = ("encoder", "random weights", "log-mel statistics")
    assert rows == [(name, how, "384" if "log" in name else "128") for name in names for how in ("linear", "knn")]
    with open(scores, newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 6 * 36
    mean = np.mean([float(row["correct"]) for row in found if (row["row"], row["method"]) == ("encoder", "knn")])
    assert f"{100 * mean:6.1f} %" in lines[3]
    # the second time nothing is embedded again, for these weights
    monkeypatch.setattr("aape_ssl.evaluation.embedding.embed", None)
    assert run("probe", checkpoint=exported, **options) == 0
    assert capsys.readouterr().out == table
    with pytest.raises(TypeError):
        run("probe", checkpoint=checkpoint, **options)


def test_probe_of_several_labels_says_that_it_tells_one(exported, manifest, tmp_path):
    several = manifest.with_name("drums.csv")
    several.write_text(manifest.read_text().replace(",drum,", ",drum;loud,"))
    with pytest.warns(
        UserWarning, match=r"labels: .*\.wav has 'drum;loud' as one label; a probe tells one label a clip"
    ):
        assert run("probe", checkpoint=exported, data=several, cache=tmp_path, methods="knn", baselines="false") == 0


def test_probe_of_one_label_is_refused(exported, manifest, tmp_path, capsys):
    alike = manifest.with_name("alike.csv")
    alike.write_text(manifest.read_text().replace(",other,", ",drum,"))
    assert run("probe", checkpoint=exported, data=alike, cache=tmp_path) == 2
    said = f"data: expected clips with at least two labels, {alike} has 1"
    assert capsys.readouterr().err.splitlines()[-1].endswith(said)


def test_probe_of_one_fold(exported, manifest, tmp_path, capsys):
    options = {"methods": "[knn]", "baselines": "false", "cache": tmp_path, "test": "[1]"}
    assert run("probe", checkpoint=exported, data=manifest, **options) == 0
    assert capsys.readouterr().out.startswith("36 clips, 2 classes, test clips 12\n")


def finetuned(exported, manifest, out, **options) -> int:
    options = {"trainer__max_epochs": 3, "data__batch_size": 6, "data__workers": 0, "data__test": 0} | options
    return run("finetune", model__checkpoint=exported, data__data=manifest, out=out, **TRAINER, **options)


def test_finetune_exports_the_best_epoch_and_tests_it_once(exported, manifest, tmp_path, capsys):
    assert finetuned(exported, manifest, tmp_path / "run") == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if "/" in line)
    encoder = load(tmp_path / "run" / "model")
    assert encoder.labels == ("drum", "other")
    with open(manifest, newline="") as file:
        held_out = [row for row in csv.DictReader(file) if row["fold"] == "0"]
    with torch.no_grad():
        x = torch.cat([encoder.log_mel(audio.load(manifest.parent / row["file"]))[..., :FRAMES] for row in held_out])
        right = [encoder.labels[i] == row["label"] for i, row in zip(encoder(x).argmax(1), held_out, strict=True)]
    assert rows["test/accuracy"].startswith(f"{np.mean(right):.4f}, 95 % interval")
    with open(tmp_path / "run" / "csv" / "version_0" / "metrics.csv", newline="") as file:
        logged = [float(row["valid/accuracy"]) for row in csv.DictReader(file) if row["valid/accuracy"]]
    assert len(logged) == 3
    assert rows["valid/accuracy"] == f"{max(logged):.4f}"
    # the encoder moved, from where it was
    before = load(exported).encoder.state_dict()
    moved = [name for name, value in encoder.encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert "layers.0.linear1.weight" in moved


def test_finetune_learns_slower_the_deeper_and_decays_matrices_only():
    module = FinetuningModule("unused", lr=1.0, layer_decay=0.5, weight_decay=0.1)
    module.model = AudioEncoder((16, 2, 2), patch_size=4, labels=("a", "b"))
    rates = {"encoder.stem": 1 / 8, "encoder.layers.0": 1 / 4, "encoder.layers.1": 1 / 2, "encoder.norm": 1, "head": 1}
    of = {parameter: group for group in module._groups() for parameter in group["params"]}
    for name, parameter in module.model.named_parameters():
        (rate,) = (rate for part, rate in rates.items() if name.startswith(f"{part}."))
        decayed = parameter.dim() > 1 and name not in module.model.no_weight_decay()
        assert (of[parameter]["lr"], of[parameter]["weight_decay"]) == (rate, 0.1 if decayed else 0.0), name


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize("limit", [{"trainer__max_steps": 1}, {"trainer__check_val_every_n_epoch": 5}])
def test_finetune_without_a_validation_exports_nothing(limit, exported, manifest, tmp_path, capsys):
    assert finetuned(exported, manifest, tmp_path, **{"trainer__max_epochs": 1} | limit) == 2
    steps = limit.get("trainer__max_steps", 2)
    said = f"--trainer: expected limits that leave a validation, there was none in {steps} steps"
    assert capsys.readouterr().err.splitlines()[-1] == f"aape-ssl: {said}"


def test_finetune_is_not_begun_where_no_validation_can_be(exported, manifest, tmp_path, capsys):
    assert finetuned(exported, manifest, tmp_path / "run", trainer__limit_val_batches=0) == 2
    said = "aape-ssl: --trainer.limit_val_batches: expected more than 0"
    assert capsys.readouterr().err.splitlines()[-1].startswith(said)
    assert not (tmp_path / "run").exists()


def test_a_fast_dev_run_writes_no_checkpoint(exported, manifest, tmp_path):
    for _ in range(2):
        assert finetuned(exported, manifest, tmp_path / "run", trainer__fast_dev_run="true") == 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_finetune_stops_where_nothing_can_be_said(exported, manifest, tmp_path, capsys, monkeypatch):
    forward = FinetuningModule.forward
    monkeypatch.setattr(FinetuningModule, "forward", lambda self, x: forward(self, x) * float("nan"))
    assert finetuned(exported, manifest, tmp_path / "nan", trainer__num_sanity_val_steps=0) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("aape-ssl: optimiser step 0: loss nan")


def test_finetune_learns_the_clips_own_labels(exported, manifest, tmp_path):
    options = {"trainer__max_epochs": 40, "model__lr": 0.01, "model__layer_decay": 1.0}
    assert finetuned(exported, manifest, tmp_path, **options) == 0
    with open(tmp_path / "csv" / "version_0" / "metrics.csv", newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert np.mean(losses[-10:]) < 0.3  # ln 2 at chance


def test_finetune_without_an_end_is_refused(exported, manifest, tmp_path, capsys):
    assert finetuned(exported, manifest, tmp_path, trainer__max_epochs=-1) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "max_epochs: expected a number of epochs, at whose end the learning rate is 0" in said


def test_finetune_of_several_labels(exported, manifest, tmp_path, capsys):
    several = manifest.with_name("several.csv")
    with open(manifest, newline="") as file:
        rows = list(csv.reader(file))
    rows[1:] = [[name, f"{label};{name.split('_')[0]}", *rest] for name, label, *rest in rows[1:]]
    with open(several, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    options = {"data__multi_label": "true", "trainer__max_epochs": 1}
    assert finetuned(exported, several, tmp_path / "run", **options) == 0
    assert "test/map" in capsys.readouterr().out
    labels = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["labels"]
    assert labels == ["ambi", "bass", "drum", "loop", "misc", "other", "perc"]


@pytest.mark.filterwarnings("ignore:No positive samples found")  # torchmetrics', of the third class
def test_classes_of_clips_that_were_not_validated_on_do_not_count(exported, tmp_path):
    """One batch of two classes, all right, of three that the validation clips have."""
    folder = tmp_path / "clips"
    clips = [Clip(f"{k}.wav", folder / f"{k}.wav", "abc"[k % 3], str(k // 6), f"g{k}") for k in range(18)]
    folder.mkdir()
    for clip in clips:
        soundfile.write(clip.path, np.random.default_rng(0).normal(size=16000) / 9, 16000)
    write_manifest(folder / "three.csv", clips)
    data = LabelledClips(str(folder / "three.csv"), str(exported), "0", batch_size=2, workers=0, multi_label=True)
    module = FinetuningModule(str(exported), lr=0.0)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=1, limit_val_batches=1, num_sanity_val_steps=0, enable_checkpointing=False, **options)
    module.forward = lambda x: torch.tensor([[9.0, -9.0, 0.0], [-9.0, 9.0, 0.0]]).requires_grad_()
    trainer.fit(module, datamodule=data)
    assert trainer.callback_metrics["valid/map"] == 1


def test_finetune_resumed_is_as_if_never_interrupted(exported, manifest, tmp_path):
    """Ten steps (at most) of 18, then the rest."""
    assert finetuned(exported, manifest, tmp_path / "whole", trainer__max_epochs=6) == 0
    options = {"trainer__max_epochs": 6, "checkpoint_every": 4}
    with pytest.MonkeyPatch.context() as patch:

        def stop(self, *given):
            if self.global_step == 6:
                raise KeyboardInterrupt
            return step(self, *given)

        step = FinetuningModule.training_step
        patch.setattr(FinetuningModule, "training_step", stop)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            finetuned(exported, manifest, tmp_path / "cut", **options)
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["global_step"] == 4
    assert finetuned(exported, manifest, tmp_path / "cut", resume="true", **options) == 0
    got, want = (torch.load(tmp_path / run / "last.ckpt", weights_only=True) for run in ("cut", "whole"))
    assert got["global_step"] == want["global_step"]
    assert all(torch.equal(value, want["state_dict"][name]) for name, value in got["state_dict"].items())


@pytest.fixture(scope="module")
def tuned(exported, manifest, tmp_path_factory):
    """A folder after one epoch."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    assert finetuned(exported, manifest, out, trainer__max_epochs=1) == 0
    return out


def relabelled(manifest, name, change):
    """The manifest with each row's (file, label) replaced by another label."""
    with open(manifest, newline="") as file:
        head, *rows = csv.reader(file)
    path = manifest.with_name(name)
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *([row[0], change(*row[:3]), *row[2:]] for row in rows)])
    return path


def test_finetune_resumed_as_another_run_is_refused(tuned, exported, manifest, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(exported, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"statistics": [0.0, 1.0]}))
    names = relabelled(manifest, "names.csv", lambda file, label, fold: "a drum" if label == "other" else "b other")
    swapped = relabelled(manifest, "swapped.csv", lambda file, label, fold: label if fold != "1" else "drum")
    changes = {
        "--model.lr: the checkpoint was made with 0.001, this run has 0.1": {"model__lr": 0.1},
        "--model.layer_decay: the checkpoint": {"model__layer_decay": 0.5},
        "--data.frames: the checkpoint was made with 32, this run has 16": {"data__frames": 16},
        "statistics: the checkpoint": {"model__checkpoint": other},
        "labels: the checkpoint was made with ['drum', 'other'], this run has ['a drum', ": {"data__data": names},
        "--data: the checkpoint was made with '12 clips and 12 to validate on": {"data__data": swapped},
        "--data.multi_label: the checkpoint": {"data__multi_label": "true"},
    }
    for said, change in changes.items():
        shutil.copytree(tuned, out := tmp_path / "run")
        given = {"model__checkpoint": exported, "data__data": manifest, "resume": "true", "out": out, **TRAINER}
        given |= {"data__batch_size": 6, "data__workers": 0, "data__test": 0}
        assert run("finetune", **given | change) == 2, said
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"aape-ssl: {said}")
        shutil.rmtree(out)


def test_finetune_resumes_from_the_same_encoder_elsewhere(tuned, checkpoint, manifest, tmp_path):
    """The checkpoint that was exported, in place of the folder."""
    shutil.copytree(tuned, tmp_path / "run")
    with pytest.warns(UserWarning, match="max_epochs: the checkpoint was made with 1, this run has 2"):
        assert finetuned(checkpoint, manifest, tmp_path / "run", resume="true", trainer__max_epochs=2) == 0


def test_a_folder_that_was_moved_still_knows_its_best_epoch(tuned, exported, manifest, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "run")
    weights = torch.load(tuned / "best.ckpt", weights_only=True)["state_dict"]
    shutil.rmtree(tmp_path / "run" / "model")
    assert finetuned(exported, manifest, tmp_path / "run", resume="true", trainer__max_epochs=1) == 0
    assert str(tmp_path / "run" / "model") in capsys.readouterr().out
    assert torch.equal(load(tmp_path / "run" / "model").head.weight, weights["model.head.weight"])


def tune(manifest, checkpoint, folder, batch_size=6, callbacks=(), **options):
    """Without the command line; returns what was logged last, and the trainer."""
    data = LabelledClips(
        str(manifest),
        str(checkpoint),
        test="0",
        batch_size=batch_size,
        workers=0,
        multi_label=options.pop("several", False),
    )
    shown = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    torch.manual_seed(0)
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, **shown, **options)
    trainer.fit(FinetuningModule(str(checkpoint), lr=1e-9), datamodule=data)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("several", [False, True])
def test_two_processes_validate_each_clip_once(several, exported, manifest, tmp_path):
    """Five clips, one of which is padded with; as they are scored by one process."""
    with open(manifest, newline="") as file:
        head, *rows = csv.reader(file)
    kept = [row for row in rows if row[2] != "1"] + [row for row in rows if row[2] == "1"][1:8]
    few = manifest.with_name("few.csv")
    with open(few, "w", newline="") as file:
        csv.writer(file).writerows([head, *kept])
    options = {"max_epochs": 1, "several": several}
    one = tune(few, exported, tmp_path / "one", **options)
    options |= {"strategy": "ddp", "devices": 2, "batch_size": 3}
    for two in in_processes(tmp_path / "two", tune, few, exported, tmp_path / "out", **options):
        assert two["valid/map" if several else "valid/accuracy"] == pytest.approx(
            one["valid/map" if several else "valid/accuracy"]
        )


class LastRate(Callback):
    """The learning rate after the last step."""

    def on_train_end(self, trainer, pl_module):
        self.rate = trainer.optimizers[0].param_groups[-1]["lr"]


@pytest.mark.parametrize(
    "limits",
    [
        {"max_epochs": 2, "batch_size": 3, "limit_train_batches": 3},
        {"max_epochs": 2, "batch_size": 3, "limit_train_batches": 0.5, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "max_steps": 100},
        {"max_epochs": 2, "max_steps": 3},
    ],
)
def test_finetunes_rate_falls_to_0_where_training_ends(limits, exported, manifest, tmp_path):
    tune(manifest, exported, tmp_path, callbacks=[last := LastRate()], **limits)
    assert last.rate == 0


def test_what_a_worker_complains_of_is_one_line():
    class Gone(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            raise audio.AudioError("a.wav: no such file")

    with pytest.raises(audio.AudioError) as caught:
        next(iter(torch.utils.data.DataLoader(Gone(), num_workers=1)))
    assert _one_line(caught.value) == "a.wav: no such file"


def test_mean_average_precision_leaves_absent_classes_out():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.7, 0.5], [0.1, 0.9, 0.5]], dtype=np.float32)
    targets = np.array([[1, 0, 0], [0, 1, 0], [1, 1, 0]], dtype=np.float32)
    # class 0 has its clips at ranks 1 and 3: (1/1 + 2/3)/2; class 1 at ranks 1 and 2: 1; class 2 does not occur
    assert mean_average_precision(scores, targets) == pytest.approx((5 / 6 + 1) / 2)


def finetune(exported, manifest, tmp_path, rows, **options):
    (tmp_path / "m.csv").write_text("\n".join(["file,label,split", *rows]))
    for path in manifest.parent.glob("*.wav"):
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).symlink_to(path)
    given = {"model__checkpoint": exported, "data__data": tmp_path / "m.csv", "out": tmp_path / "run", **TRAINER}
    given |= {"trainer__max_epochs": 1, "data__batch_size": 4, "data__workers": 0, **options}
    return run("finetune", **given)


def split_rows(manifest):
    names = [line.split(",")[0] for line in manifest.read_text().splitlines()[1:]]
    return [f"{name},{'ab'[n % 2]},{('train', 'train', 'valid', 'test')[n // 2 % 4]}" for n, name in enumerate(names)]


def test_a_test_clip_that_cannot_be_used_ends_it_before_the_training(exported, manifest, tmp_path, capsys):
    soundfile.write(tmp_path / "nan.wav", np.full(8000, np.nan, np.float32), 16000, subtype="FLOAT")
    for name, why in (("gone.wav", "no such file"), ("nan.wav", "holds samples that are not finite")):
        rows = [*split_rows(manifest), f"{tmp_path / name},a,test"]
        assert finetune(exported, manifest, tmp_path, rows) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"aape-ssl: {tmp_path / name}: {why}"
        assert not (tmp_path / "run").exists()


def test_training_clips_that_cannot_be_decoded_are_listed(exported, manifest, tmp_path, capsys):
    rows = [*split_rows(manifest), "gone.wav,a,train"]
    assert finetune(exported, manifest, tmp_path, rows, data__max_failed=0.1, trainer__max_epochs=3) == 0
    assert "1 of 21 clips could not be decoded:\n  gone.wav: no such file" in capsys.readouterr().err


def test_labels_that_are_tested_and_never_trained_on(exported, manifest, tmp_path):
    rows = split_rows(manifest)
    rows[6] = rows[6].replace(",a,test", ",a;b,test")
    with (
        pytest.warns(UserWarning, match="labels: 1 of 3, such as 'a;b', are validated or tested and are not among"),
        pytest.warns(UserWarning, match=r"labels: .* has 'a;b' as one label; multi_label takes it for several"),
    ):
        assert finetune(exported, manifest, tmp_path, rows) == 0


def test_a_label_of_several_that_is_empty(exported, manifest, tmp_path, capsys):
    rows = split_rows(manifest)
    rows[6] = rows[6].replace(",a,test", ",a;,test")
    assert finetune(exported, manifest, tmp_path, rows, data__multi_label="true") == 2
    assert "--data: expected labels separated by ;, bass_dnb_f-0.wav has 'a;'" in capsys.readouterr().err


ERRORS = {
    "no such checkpoint": ("probe", {"checkpoint": "nowhere"}, "nowhere: expected a checkpoint or an exported folder"),
    "no model": ("probe", {"checkpoint": "."}, ".: expected a folder with config.json and model.safetensors"),
    "no labels": ("probe", {"data": "clips"}, "--data: expected clips with labels, as of a manifest's column"),
    "no fold": ("probe", {"test": "[9]"}, "--test: expected folds among 0, 1, 2, got 9"),
    "no GPU": ("embed", {"device": "cuda", "out": "x.npz"}, "--device: expected cpu"),
    "kind of file": ("embed", {"out": "x.txt"}, "--out: expected a .npz or .parquet file"),
    "not pre-trained": (
        "export",
        {"checkpoint": "manifest", "out": "x"},
        "manifest.csv: the checkpoint cannot be read",
    ),
    "one label": ("finetune", {"data.data": "one label"}, "--data: expected at least two labels, got drum"),
    "no head": ("finetune", {"model.layer_decay": 0}, "--model.layer_decay: expected a number in (0, 1], got 0.0"),
    "no test": ("finetune", {}, "--data.test: expected folds among 0, 1, 2, got test"),
    "16 bits": (
        "finetune",
        {"data.test": 0, "trainer.max_epochs": 1, "trainer.precision": "bf16-true"},
        "--trainer.precision: expected weights in float32",
    ),
    "smoothing": (
        "finetune",
        {"data.test": 0, "trainer.max_epochs": 1, "data.multi_label": "true", "model.label_smoothing": 0.1},
        "--model.label_smoothing: expected 0 for clips of several labels, got 0.1",
    ),
    "few for kNN": (
        "probe",
        {"data": "few", "frames": FRAMES, "baselines": "false", "cache": "cache"},
        "--methods: expected linear alone, as knn wants 10 training clips, got 9",
    ),
    "no writing": ("embed", {"out": "locked/x.npz"}, "--out: locked/x.npz lies in a folder that cannot be written to"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, exported, manifest, tmp_path, capsys, monkeypatch):
    if case == "no GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    one = tmp_path / "one.csv"
    rows = [line for line in manifest.read_text().splitlines() if ",other," not in line]
    one.write_text("\n".join(rows))
    header, *lines = manifest.read_text().splitlines()
    few = manifest.with_name("few.csv")
    few.write_text("\n".join([header, *(line for n, line in enumerate(lines) if n % 4 != 3)][:28]))
    (tmp_path / "locked").mkdir()
    accessible = os.access  # to root, everything is
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and accessible(path, mode))
    command, options, message = ERRORS[case]
    paths = {"clips": demo.bundled_clips()[0].parent, "manifest": manifest, "one label": one, "few": few}
    given = {"checkpoint": exported, "data": manifest}
    if command == "finetune":
        given = {"model.checkpoint": exported, "data.data": manifest, **TRAINER}
    elif command == "export":
        given.pop("data")
    given |= {name: paths.get(value, value) for name, value in options.items()}
    assert run(command, **given) == 2
    last = capsys.readouterr().err.splitlines()[-1].replace(f"{manifest.parent}/", "")
    assert last.startswith(f"aape-ssl: {message}")


@pytest.mark.parametrize("command", ["probe", "embed", "export", "finetune"])
def test_help_and_configuration(command, capsys):
    with pytest.raises(SystemExit) as done:
        main([command, "--help"])
    assert done.value.code == 0
    assert f"aape-ssl {command}" in capsys.readouterr().out


def test_print_config(exported, manifest, capsys):
    with pytest.raises(SystemExit):
        run("finetune", model__checkpoint=exported, data__data=manifest, print_config="")
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["trainer"]["max_epochs"] == 50
    assert printed["data"]["data"] == str(manifest)


def test_weights_that_are_missing_are_not_made_up(exported, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(exported, tmp_path / "encoder")
    path = tmp_path / "encoder" / "model.safetensors"
    weights = load_file(path)
    weights.pop("encoder.norm.weight")
    save_file(weights, path)
    with pytest.raises(checkpoints.CheckpointError, match=r"encoder: cannot be loaded .*encoder\.norm\.weight"):
        load(tmp_path / "encoder")


def documented() -> list[list[str]]:
    """The commands that README and docs/pretraining.md show."""
    root = Path(__file__).parents[2]
    text = "\n".join((root / name).read_text() for name in ("README.md", "docs/pretraining.md"))
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL))
    return [shlex.split(line, comments=True)[1:] for line in blocks.splitlines() if line.startswith("aape-ssl ")]


@pytest.mark.parametrize("argv", documented(), ids=lambda argv: argv[0])
def test_documented_commands_are_understood(argv, exported, monkeypatch, capsys):
    monkeypatch.chdir(exported.parent)
    with pytest.raises(SystemExit) as done:
        main([*argv, "--print_config"])
    assert done.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)


def test_documented_python(exported, monkeypatch):
    root = Path(__file__).parents[2]
    readme = (root / "README.md").read_text().partition("## Pre-training")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", readme + (root / "docs" / "pretraining.md").read_text(), re.S)
    monkeypatch.chdir(exported.parent)
    found = {"waveform": torch.randn(2, 8000)}
    assert len(code) == 2
    for block in code:
        exec(block, found)
        assert found.pop("tokens").shape == (2, 8 * 3, 16)
