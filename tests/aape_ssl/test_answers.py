"""What the command line answers to mistakes and to --help, and one name for one thing in every command."""

import os
import stat
import subprocess
import sys

import cli_case
import huggingface_hub
import numpy as np
import pytest
import soundfile
import torch
import yaml

from aape_kernels import hub
from aape_ssl.cli import main
from aape_ssl.demo import command as demo
from aape_ssl.demo import picture, stems
from aape_ssl.evaluation import commands
from aape_ssl.saved.checkpoints import CheckpointError
from aape_ssl.saved.pretrained import AudioEncoder, load
from aape_ssl.training.commands import PRESETS
from aape_ssl.training.runs import _with_preset

SOUND = demo.bundled_clips()[0]
CLIPS = SOUND.parent
TINY = {"model.stem_options": '{"num_states": 4, "kernel": "bilateral", "band": [0.1, 2.0], "window": 12}'}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a stem with none of the default settings."""
    out = tmp_path_factory.mktemp("run")
    assert main(cli_case.arguments(CLIPS, out, **TINY)) == 0
    return out / "last.ckpt"


@pytest.fixture(scope="module")
def exported(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "encoder"
    assert main(["export", "--checkpoint", str(checkpoint), "--out", str(out)]) == 0
    return out


@pytest.fixture
def answer(tmp_path, monkeypatch, capsys):
    """Exit status and stderr's lines but lightning's."""
    monkeypatch.chdir(tmp_path)

    def ask(*argv: object) -> tuple[object, list[str]]:
        try:
            status: object = main([*map(str, argv)])
        except SystemExit as end:
            status = end.code
        lines = capsys.readouterr().err.splitlines()
        return status, [line for line in lines if line.startswith("aape-ssl")]

    return ask


# as small as it gets: a mistake may be found when the model is there already
PRETRAIN = ["pretrain", "--data", CLIPS, "--model.size=[16,1,2]", "--model.predictor_heads=2"]
MISTAKES = {
    "misspelt": (["pretrain", "--dta", "x"], "--dta: no such option; did you mean --data?"),
    "misspelt, of the trainer": (
        [*PRETRAIN, "--trainer.max_step=3"],
        "--trainer.max_step: no such option; did you mean --trainer.max_steps?",
    ),
    "the last part of a name": (["pretrain", "--batch_size=3"], "--batch_size: no such option; did you mean"),
    "shortened": (["probe", "--check=x"], "--check: no such option; did you mean --checkpoint?"),
    "no data": (["pretrain"], "--data: expected, and not given"),
    "no data, with a preset": (["pretrain", "--preset", "laptop"], "--data: expected, and not given"),
    "nothing to probe": (["probe", "--methods=knn"], "--checkpoint, --data: expected, and not given"),
    "nothing to tune": (["finetune", "--data", "x.csv"], "--checkpoint: expected, and not given"),
    "nowhere to export to": (["export", "--checkpoint=x"], "--out: expected, and not given"),
    "preset": (["pretrain", "--preset", "lptop"], "--preset: expected one of base, laptop, got 'lptop'"),
    "no such data": (["pretrain", "--data", "no.csv"], "no.csv: cannot be read (No such file or directory)"),
    "no such folder": (["pretrain", "--data=nowhere"], "nowhere: expected a folder, a sound file, a .csv manifest"),
    "no such checkpoint": (
        ["finetune", "--checkpoint=none", "--data=no.csv"],
        "none: expected a checkpoint or an exported folder",
    ),
    "a word for a number": (
        [*PRETRAIN, "--model.lr=fast"],
        "--model.lr: expected float, got fast",
    ),
    "a word for a dict": (
        [*PRETRAIN, "--model.stem_options={num_state:16}"],
        "--model.stem_options: expected dict, got {num_state:16}",
    ),
    "an option of no stem": (
        [*PRETRAIN, "--model.stem_options={num_state: 16}"],
        "--model.stem_options: aape has no option num_state; did you mean num_states?",
    ),
    "a word for a number, of the data": ([*PRETRAIN, "--data.mix=abc"], "--data.mix: expected float, got abc"),
    "half of the statistics": (
        [*PRETRAIN, "--data.statistics=[nan,1]"],
        "--data.statistics: expected preset, data or float, got nan",
    ),
    "misspelt, of the data": ([*PRETRAIN, "--data.mx=1"], "--data.mx: no such option; did you mean --data.mix?"),
    "a word for a number, of a callback": (
        [*PRETRAIN, "--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.patience=x"],
        "--trainer.callbacks.patience: expected int, got x",
    ),
    "a callback without what it needs": (
        [*PRETRAIN, "--trainer.callbacks=lightning.pytorch.callbacks.EarlyStopping"],
        "--trainer.callbacks.monitor: expected, and not given",
    ),
    "sound for a configuration": (["pretrain", "--config", SOUND], "--config: expected a file of options"),
    "sound for a probe's configuration": (["probe", "--config", SOUND], "--config: expected a file of options"),
    "none of the choices": (
        [*PRETRAIN, "--model.stem=cnn"],
        "--model.stem: expected aape, aape-fixed, conv, conv+mlp, got cnn",
    ),
    "a method": (
        ["probe", "--checkpoint=x", "--data=x.csv", "--methods=svm"],
        "--methods: expected linear, knn, got svm",
    ),
    "half of a pair": ([*PRETRAIN, "--model.ema=0.9"], "--model.ema: expected tuple, got 0.9"),
    "no class": (["pretrain", "--data=ClipDat"], "--data: there is no such file, folder or class, got ClipDat"),
    "no configuration": (
        ["pretrain", "--config", CLIPS / "LICENSE.md", "--data", CLIPS],
        "--config: expected a file of options",
    ),
    "what a data module says": (
        [*PRETRAIN, "--data.front_end=mel"],
        "--data.front_end: expected one of audioset128, m2d80, got 'mel'",
    ),
    "what the stem says": (
        [*PRETRAIN, "--model.stem_options={window: 3}"],
        "--model.stem_options: window: expected a positive even number of frames",
    ),
    "what the masks say": (
        [*PRETRAIN, "--model.masks.ratio=2"],
        "--model.masks.ratio: expected a number in (0, 1), got 2.0",
    ),
    "the masks' seed, not the data's": (
        [*PRETRAIN, "--model.masks.seed=-1"],
        "--model.masks.seed: expected an int, at least 0, got -1",
    ),
    "the data's seed": ([*PRETRAIN, "--data.batch_size=2", "--data.seed=-1"], "--data.seed: expected "),
    "a predictor without heads": ([*PRETRAIN, "--model.predictor_heads=0"], "--model.predictor_heads: expected at"),
    "what the predictor says": (
        [*PRETRAIN, "--model.predictor_dim=7"],
        "--model.predictor_dim: expected a multiple of 4",
    ),
    "growing weights": (
        [*PRETRAIN, "--model.weight_decay=-1"],
        "--model.weight_decay: expected a number in [0, inf), got -1.0",
    ),
    "warm-up": ([*PRETRAIN, "--model.warmup_steps=-1"], "--model.warmup_steps: expected at least 0"),
    "no vector": ([*PRETRAIN, "--model.projection_dim=0"], "--model.projection_dim: expected an int, at least 1"),
    "less than a patch": (
        [*PRETRAIN, "--data.batch_size=2", "--data.frames=3"],
        "--data.frames: expected at least 16, those of a patch, got 3",
    ),
    "no batch": ([*PRETRAIN, "--data.batch_size=0"], "--data.batch_size: expected an int, at least 1, got 0"),
    "no workers": ([*PRETRAIN, "--data.workers=-1"], "--data.workers: expected an int, at least 0, got -1"),
    "no accumulation": (
        [*PRETRAIN, "--trainer.accumulate_grad_batches=0"],
        "--trainer.accumulate_grad_batches: expected at least 1, got 0",
    ),
    "no clipping": (
        [*PRETRAIN, "--trainer.gradient_clip_val=-1"],
        "--trainer.gradient_clip_val: expected at least 0, got -1",
    ),
    "no strategy": ([*PRETRAIN, "--trainer.strategy=none"], "--trainer.strategy: "),
    "never": ([*PRETRAIN, "--checkpoint_every=0"], "--checkpoint_every: expected at least 1, got 0"),
    "nothing to see": ([*PRETRAIN, "--monitor_every=0"], "--monitor_every: expected at least 1"),
    "a file for a folder": (
        [*PRETRAIN, "--out", CLIPS / "LICENSE.md"],
        f"--out: expected a folder, {CLIPS / 'LICENSE.md'} is a file",
    ),
    "no step": (
        [*PRETRAIN, "--data.batch_size=2", "--trainer.limit_train_batches=0"],
        "--trainer: expected limits that leave something to train on",
    ),
    "steps": (
        [*PRETRAIN, "--data.batch_size=2", "--trainer.max_steps=-5"],
        "--trainer.max_steps: `max_steps` must be a non-negative integer or -1",
    ),
    "more than there is": (
        ["pretrain", "--preset=laptop", "--data", CLIPS],
        "--data.batch_size: expected at most the 6 clips there are, got 32 in all",
    ),
    "width": ([*PRETRAIN, "--data.batch_size=2", "--model.size=[130,2,4]"], "--model.size: expected"),
    "of the demo": (["demo", "x.wav", "--checkpont=x"], "--checkpont: no such option; did you mean --checkpoint?"),
    "of the demo, a number": (["demo", "x.wav", "--seconds=0"], "--seconds: expected a positive number of seconds"),
    "the demo's data": (["demo", "--data=nowhere.wav"], "nowhere.wav: no such file"),
    "left over": (["embed", "clips"], "clips: expected --option=value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_answered_shortly_and_leaves_nothing(case, answer, tmp_path):
    argv, expected = MISTAKES[case]
    status, lines = answer(*argv)
    assert status == 2
    assert 1 <= len(lines) <= 2
    assert lines[0].startswith(f"aape-ssl: {expected}")
    assert all(len(line) < 400 for line in lines)
    assert lines[1:] in ([], [f"aape-ssl: `aape-ssl {argv[0]} --help` lists the options"])
    assert not list(tmp_path.iterdir())


def test_a_preset_in_a_file_of_options_is_refused(answer, tmp_path):
    (tmp_path / "options.yaml").write_text("preset: laptop\n")
    said = "aape-ssl: --preset: expected on the command line, got 'laptop' from a file of options"
    assert answer(*PRETRAIN, "--config=options.yaml") == (2, [said])


def test_the_last_preset_is_the_one():
    argv = ["--preset", "laptop", "--data=x", "--preset=base"]
    assert _with_preset(PRESETS, argv) == ["--config", str(PRESETS["base"]), "--data=x"]


def test_a_refused_run_leaves_what_was_there(answer, tmp_path):
    (tmp_path / "run" / "csv").mkdir(parents=True)
    (tmp_path / "run" / "csv" / "notes").write_text("mine")
    assert answer("pretrain", "--preset=laptop", "--data", CLIPS, "--out", tmp_path / "run")[0] == 2
    assert [path.name for path in sorted((tmp_path / "run").rglob("*"))] == ["csv", "notes"]


def test_windows_longer_than_every_clip(exported, answer, tmp_path):
    said = "aape-ssl: --frames: expected at most 400, as the longest clip has, got 100000"
    for argv in (["embed", "--out=x.npz"], ["probe"]):
        data = tmp_path / "two.csv"
        names = [path.resolve() for path in demo.bundled_clips()]
        rows = [f"{path},{n % 2},{('train', 'valid', 'test')[n % 3]}" for n, path in enumerate(names)]
        data.write_text("\n".join(["file,label,split", *rows]))
        status, lines = answer(*argv, "--checkpoint", exported, "--data", data, "--frames=100000")
        assert (status, lines) == (2, [said])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["embed", "--data", CLIPS, "--out=x.npz", "--batch_size=0"], "--batch_size: expected at least 1, got 0"),
        (["embed", "--data", CLIPS, "--out=x.npz", "--device=xyz"], "--device: expected cpu or cuda, got xyz"),
        (["embed", "--data", CLIPS, "--out=x.npz", "--frames=3"], "--frames: expected at least 16, those of a patch"),
        (
            ["embed", "--data", CLIPS, "--out=x.npz", "--frames=31"],
            "--frames: expected a multiple of 16, those of a patch",
        ),
        (["probe", "--data", "m.csv", "--frames=31"], "--frames: expected a multiple of 16, those of a patch, got 31"),
        (["probe", "--data", CLIPS], "--data: expected clips with labels, as of a manifest's column `label`"),
        (["probe", "--data", "m.csv", "--methods=[]"], "--methods: expected linear, knn or both, got none"),
        (["probe", "--data", "m.csv", "--scores=no/s.csv"], "--scores: no/s.csv lies in a folder that is not there"),
    ],
)
def test_mistakes_beside_a_checkpoint(argv, said, exported, answer, tmp_path):
    (tmp_path / "m.csv").write_text(f"file,label\n{CLIPS / 'a.flac'},a\n{CLIPS / 'b.flac'},b\n")
    status, lines = answer(*argv, "--checkpoint", exported)
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith(f"aape-ssl: {said}")
    assert [path.name for path in tmp_path.iterdir()] == ["m.csv"]


@pytest.mark.parametrize(
    ("waveform", "error", "said"),
    [
        (torch.zeros(16000, dtype=torch.int16), TypeError, "expected floating-point samples, .*got torch.int16"),
        (torch.zeros(16000, dtype=torch.bool), TypeError, "expected floating-point samples, .*got torch.bool"),
        (np.zeros(16000, np.float32), TypeError, "expected a tensor, got ndarray"),
        (torch.full((16000,), 1e20), ValueError, r"expected finite samples, full scale ±1, got up to 1e\+20"),
        (torch.full((16000,), torch.nan), ValueError, "expected finite samples, full scale ±1, got up to nan"),
        (torch.zeros(160), ValueError, "expected at least 2800 samples, one patch, got 160"),
    ],
)
def test_waveforms_that_are_none(waveform, error, said, exported):
    with pytest.raises(error, match=f"waveform: {said}"):
        load(exported).log_mel(waveform)


@pytest.mark.parametrize("shape", [(1, 1, 80, 64), (1, 1, 64, 128), (1, 1, 256, 64), (1, 128, 64), (1, 3, 128, 64)])
def test_spectrograms_that_are_none(shape, exported):
    """Of another front end, (frames, mel bins) as AST has them, and others."""
    encoder = load(exported)
    for take in (encoder, encoder.forward_features, encoder.tokens):
        with pytest.raises(ValueError, match=r"x: expected shape \(batch, 1, 128 mel bins, frames\), got"):
            take(torch.zeros(shape))


@pytest.mark.parametrize(
    "given",
    [
        *({"statistics": pair} for pair in ((0.0, 0.0), (0.0, -1.0), (float("nan"), 1.0), (0.0, float("inf")), (1.0,))),
        {"labels": "cat"},
        {"labels": ["a", "b", "a"]},
        {"frames": -1},
        {"frames": 15},
        {"frames": None},
        {"patch_size": 200},
    ],
    ids=str,
)
def test_arguments_that_make_no_encoder(given):
    with pytest.raises(ValueError, match=rf"^{next(iter(given))}: expected"):
        AudioEncoder((16, 1, 2), **given)


def test_waveforms_of_another_precision_are_converted(exported):
    waveform, encoder = 0.1 * torch.randn(16000), load(exported)
    assert torch.equal(encoder.log_mel(waveform.double()), encoder.log_mel(waveform))


# --- help ---


@pytest.mark.parametrize("command", ["pretrain", "finetune", "probe", "embed", "export", "demo"])
def test_help_fits_on_two_screens(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    usage, _, options = text.partition("\n\n")
    assert usage.startswith(f"usage: aape-ssl {command} ")
    assert text.count("\n") < 80
    assert "NoneType" not in text
    assert "(default: " in text or command == "export"
    if command in ("pretrain", "finetune"):
        assert options.index("--model.lr") < options.index("--trainer.max_steps")
        assert "--trainer.limit_val_batches" not in text


def test_the_trainers_own_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["pretrain", "--trainer.help"])
    assert end.value.code == 0
    assert "--trainer.limit_val_batches" in capsys.readouterr().out


def test_version(capsys):
    from importlib.metadata import version

    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"aape-ssl {version('aape-kernels')}\n"


def test_who_has_read_enough(tmp_path):
    """`| head -1`: no traceback, and the status that the shell gives a program that SIGPIPE ended."""
    clips = [*map(str, demo.bundled_clips()[:2])]
    command = [sys.executable, "-c", "from aape_ssl.cli import main; import sys; sys.exit(main())"]
    read, write = os.pipe()
    os.close(read)
    argv = [*command, "demo", *clips, "--seconds=0.3", f"--out={tmp_path}"]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_who_has_read_nothing():
    """What was printed is still in a buffer when the command ends."""
    read, write = os.pipe()
    os.close(read)
    argv = [sys.executable, "-c", "from aape_ssl.cli import main; import sys; sys.exit(main())", "--version"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_that_nobody_reads_is_no_complaint(monkeypatch, capsys):
    def export(checkpoint: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setitem(commands.COMMANDS, "export", export)
    with pytest.raises(BrokenPipeError):  # `cli.main` makes a status of it
        commands.main("export", ["--checkpoint=x"])
    assert capsys.readouterr().err == ""


# --- one name for one thing ---


def configuration(capsys, *argv: object) -> dict:
    with pytest.raises(SystemExit) as end:
        main([*map(str, argv), "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def test_data_and_checkpoint_are_called_so_everywhere(exported, capsys):
    short = configuration(capsys, "finetune", "--checkpoint", exported, "--data", "x.csv")
    long = configuration(capsys, "finetune", f"--model.checkpoint={exported}", "--data.data=x.csv")
    assert short == long
    assert short["model"]["checkpoint"] == str(exported)
    for given in (["--data", CLIPS], [f"--data={CLIPS}"], [f"--data.data={CLIPS}"]):
        found = configuration(capsys, "pretrain", *given)["data"]
        assert found["class_path"] == "aape_ssl.sound.data.ClipData"
        assert found["init_args"]["data"] == str(CLIPS)
    # a data module is still one
    found = configuration(capsys, "pretrain", "--data=aape_ssl.sound.data.ClipData", "--data.data=x.csv")["data"]
    assert found["init_args"]["data"] == "x.csv"


@pytest.mark.parametrize("given", [["--methods=knn"], ["--methods", "knn"], ["--methods=[knn]"]])
def test_one_method_is_a_list_of_one(given, capsys):
    assert configuration(capsys, "probe", "--checkpoint=x", "--data=x.csv", *given)["methods"] == ["knn"]


def test_two_methods_and_a_fold(capsys):
    found = configuration(capsys, "probe", "--checkpoint=x", "--data=x.csv", "--methods", "knn,linear", "--test=2")
    assert found["methods"] == ["knn", "linear"]
    assert found["test"] == ["2"]


@pytest.mark.parametrize("name", ["01", "1.0", "1e1", "yes", "null", "#1"])
def test_folds_are_called_what_is_typed(name, capsys):
    for given in ([f"--test={name},b"], ["--test", f"{name},b"], [f"--test=[{name}, b]"], [f'--test=["{name}","b"]']):
        assert configuration(capsys, "probe", "--checkpoint=x", "--data=x.csv", *given)["test"] == [name, "b"]


# --- what is written ---


def test_exported_files_are_like_any_other(exported):
    mask = os.umask(0)
    os.umask(mask)
    for path in exported.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name
    card = (exported / "README.md").read_text()
    assert "pushed to the Hub" not in card
    assert "More Information Needed" not in card
    assert "stem `aape`" in card
    names: dict = {"waveform": torch.randn(16000)}
    code = card.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("this folder, or its name on the Hub", str(exported)), names)
    assert names["embedding"].shape == (1, names["encoder"].num_features)


def test_a_stems_files_too(tmp_path):
    hub.AaPE(embed_dim=8).save_pretrained(tmp_path)
    mask = os.umask(0)
    os.umask(mask)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask for path in tmp_path.iterdir())
    assert "pushed to the Hub" not in (tmp_path / "README.md").read_text()


def test_a_folder_that_is_not_there_asks_no_network(monkeypatch):
    def ask(*given, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(huggingface_hub.hub_mixin, "hf_hub_download", ask)
    with pytest.raises(
        CheckpointError, match="nosuchdir: there is no such folder, and a name on the Hub is owner/name"
    ):
        AudioEncoder.from_pretrained("nosuchdir")
    with pytest.raises(CheckpointError, match=r"\./nosuchdir: there is no such folder"):
        AudioEncoder.from_pretrained("./nosuchdir")
    with pytest.raises(ValueError, match="nosuchdir: there is no such folder, and a name on the Hub is owner/name"):
        hub.AaPE.from_pretrained("nosuchdir")
    with pytest.raises(AssertionError, match="network was asked"):
        AudioEncoder.from_pretrained("owner/name")


# --- the demo ---


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(demo, "BUDGET", 0.0)
    monkeypatch.setattr(picture, "DPI", 40)


@pytest.mark.parametrize("kind", ["checkpoint", "exported"])
def test_the_demo_takes_settings_and_teacher_from_what_was_trained(kind, request, capsys, tmp_path, quick):
    path = request.getfixturevalue(kind)
    stem, front_end = stems.load_encoders_stem(path)
    teacher = load(path)
    assert (stem.num_states, stem.kernel, stem.band, stem.window) == (4, "bilateral", (0.1, 2.0), 12)
    assert front_end == teacher.front_end
    assert all(torch.equal(value, teacher.encoder.stem.state_dict()[name]) for name, value in stem.state_dict().items())
    assert main(["demo", str(CLIPS), "--seconds=0.5", "--checkpoint", str(path), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "taken as AaPE's defaults" not in out
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_the_demo_and_a_stem_without_filters(tmp_path, answer):
    AudioEncoder((16, 1, 2), "conv").save_pretrained(tmp_path / "conv")
    status, lines = answer("demo", "--checkpoint", tmp_path / "conv")
    assert status == 2
    assert lines == [
        f"aape-ssl: --checkpoint {tmp_path / 'conv'}: its stem is a ConvStem, which has no filters to look at"
    ]


def noise(path, seconds):
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(int(seconds * 16000)), 16000)
    return str(path)


def test_the_demo_takes_manifests_and_says_which_source_is_missing(tmp_path, capsys, quick):
    noise(tmp_path / "a.wav", 0.5)
    (tmp_path / "clips.csv").write_text("file\na.wav\nb.wav\n")
    out = tmp_path / "out"
    assert main(["demo", str(tmp_path / "clips.csv"), str(tmp_path / "none.csv"), "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert [path.name for path in out.iterdir()] == ["a.png"]
    assert "none.csv: cannot be read" in said.err
    assert "b.wav: no such file" in said.err


def test_the_demo_of_a_part(tmp_path, capsys, quick):
    path = noise(tmp_path / "long.wav", 3.0)
    assert main(["demo", path, "--start=1.5", "--seconds=1", "--out", str(tmp_path)]) == 0
    assert "1 of 3.0" in capsys.readouterr().out
    assert main(["demo", path, "--start=2.5", "--seconds=9", "--out", str(tmp_path)]) == 0
    assert "0.5 of 3.0" in capsys.readouterr().out
    assert main(["demo", path, "--start=3", "--out", str(tmp_path)]) == 2
    assert "has 3.00 s, nothing from --start 3 on" in capsys.readouterr().err


def test_long_clips_have_pages(tmp_path, monkeypatch, quick):
    monkeypatch.setattr(picture, "PATCHES", 5)
    drawn = []
    draw = picture.draw

    def watched(log_mel, front_end, stem, responses, name, label, start):
        figure = draw(log_mel, front_end, stem, responses, name, label, start)
        spectrogram = figure.axes[0]
        drawn.append((log_mel.shape[1], responses.energy.shape[1], spectrogram.get_xlim(), spectrogram.patches))
        return figure

    monkeypatch.setattr(picture, "draw", watched)
    assert main(["demo", noise(tmp_path / "long.wav", 2.0), "--start=0.2", f"--out={tmp_path}"]) == 0
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["long-page2.png", "long-page3.png", "long.png"]
    # 178 frames: 11 patches and two frames
    assert [(frames, patches) for frames, patches, *_ in drawn] == [(80, 5), (80, 5), (18, 1)]
    assert [tuple(np.round(limits, 3)) for *_, limits, _ in drawn] == [(0.2, 1.0), (1.0, 1.8), (1.8, 1.98)]
    assert [bool(hatched) for *_, hatched in drawn] == [False, False, True]  # what no patch covers


def test_names_in_any_script_can_be_read(recwarn, tmp_path):
    assert picture.drawable("bird-Vögel") == "bird-Vögel"
    assert picture.drawable("鳥の声") == "NiaonoSheng"
    assert picture.drawable("\ue000") == "?"


@pytest.mark.parametrize(("load_average", "said"), [(0.1, False), (3.5, True)])
def test_rates_of_a_busy_machine_are_not_to_be_trusted(load_average, said, tmp_path, capsys, monkeypatch, quick):
    monkeypatch.setattr(os, "getloadavg", lambda: (load_average, 0.0, 0.0))
    assert main(["demo", noise(tmp_path / "a.wav", 0.5), f"--out={tmp_path}"]) == 0
    assert ("THE MACHINE IS NOT IDLE (load 3.5" in capsys.readouterr().out) is said
