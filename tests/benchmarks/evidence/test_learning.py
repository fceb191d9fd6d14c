"""Pre-training and fine-tuning from memory: alike for all stems, and the product's own."""

import math

import numpy as np
import pytest
import torch
from evidence_case import prepared

from aape_kernels import AaPE
from aape_ssl.evaluation import probe
from aape_ssl.saved.pretrained import load
from aape_ssl.training import finetuning
from aape_ssl.training.pretraining import PretrainingModule
from benchmarks.evidence import learning
from benchmarks.evidence.configurations import COMPARED, Configuration, adapting, multiply_adds, sizes
from benchmarks.evidence.kept import KeptCrops
from benchmarks.evidence.learning import OutOfTimeError, Recipe, finetune, pretrain, untrained
from benchmarks.evidence.material import CHOICES

RECIPE = Recipe(3, batch_size=4, frames=32, epochs=2, tuning_batch_size=8)


@pytest.fixture(autouse=True)
def _small_and_quiet(monkeypatch, recwarn):
    options = {**learning._preset()}
    options["model"] = {**options["model"], "size": [16, 2, 2], "predictor_heads": 2, "top_layers": 2}
    monkeypatch.setattr(learning, "_preset", lambda: options)


pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of a collapse, which three steps are
]


def test_all_configurations_of_one_seed_start_alike():
    """But for the branch; and the teacher as the student."""
    states = {name: untrained(each, 1, RECIPE).state_dict() for name, each in COMPARED.items()}
    shared = states["conv"]
    for state in states.values():
        for name, value in shared.items():
            assert torch.equal(state[name], value), name
        for name, value in state.items():
            if name.startswith("objective.student."):
                assert torch.equal(state[name.replace("student", "teacher")], value), name
    other = untrained(COMPARED["conv"], 2, RECIPE).state_dict()
    assert not torch.equal(
        other["objective.student.layers.0.linear1.weight"], shared["objective.student.layers.0.linear1.weight"]
    )


def test_masks_and_options_are_the_presets():
    module = untrained(COMPARED["aape"], 3, RECIPE)
    assert isinstance(module, PretrainingModule)
    preset = learning._preset()["model"]
    assert module.options["lr"] == preset["lr"]
    assert module.options["ema"] == tuple(preset["ema"])
    assert module.options["masks"] == {**module.options["masks"], **preset["masks"], "seed": 3}
    assert module.options["warmup_steps"] == 1


def test_a_wider_w2_and_a_rate_of_its_own_for_the_encoder(tmp_path, monkeypatch):
    """The encoder moves by so much more, from so late on; everything else's groups stay as they are."""
    wide = Configuration("wide", "aape", {"num_states": 4}, w2_std=0.5)
    for part in (untrained(wide, 0, RECIPE).objective.student, untrained(wide, 0, RECIPE).objective.teacher):
        assert 0.3 < part.stem.encoder.w2.std() < 0.7

    def rates(configuration: Configuration) -> dict[str, list[float]]:
        module, seen = untrained(configuration, 0, RECIPE), {"encoder": [], "rest": []}
        own = {id(p) for p in module.objective.student.stem.encoder.parameters()}

        class Look(learning.Callback):
            def on_before_optimizer_step(self, trainer, pl_module, optimizer):
                for name, inside in (("encoder", True), ("rest", False)):
                    found = {g["lr"] for g in optimizer.param_groups for p in g["params"] if (id(p) in own) == inside}
                    seen[name].append(found.pop())
                    assert not found
                count = sum(len(g["params"]) for g in optimizer.param_groups)
                assert count == sum(p.requires_grad for p in module.parameters())
                decays = {g["weight_decay"] for g in optimizer.param_groups}
                assert decays == {0.0, 0.05}

        kept = prepared(tmp_path, monkeypatch)
        loader = learning.ClipLoader(KeptCrops(kept.pretraining, kept.kept, 0), 4)
        learning._trainer("cpu", math.inf, [Look()], max_steps=3).fit(module, loader)
        return seen

    usual = rates(Configuration("usual", "aape", {"num_states": 4}))
    assert usual["encoder"] == usual["rest"]
    fast = rates(Configuration("fast", "aape", {"num_states": 4}, encoder_rate=3.0, encoder_from=0.34))
    assert fast["rest"] == usual["rest"]
    assert fast["encoder"] == [0.0, *(pytest.approx(3 * rate) for rate in usual["rest"][1:])]


def test_crops_are_the_clips_late_by_random_numbers_of_their_own(tmp_path, monkeypatch):
    kept = prepared(tmp_path, monkeypatch)
    crops = KeptCrops(kept.pretraining, kept.kept, 5)
    batch = crops.__getitems__([(0, 3), (1, 3), (0, 4)])
    again = crops.__getitems__([(0, 4), (0, 3)])
    assert batch["log_mel"].shape == (3, 1, 128, 32)
    assert torch.equal(batch["log_mel"][2], again["log_mel"][0])
    assert not torch.equal(batch["log_mel"][0], batch["log_mel"][1])
    rows, shifts = kept.kept.rows(kept.pretraining), []
    for epoch in range(40):
        x = crops.__getitems__([(epoch, 3)])["log_mel"][0]
        every = [kept.kept.at(rows[[3]], np.array([shift]))[0][0] for shift in range(16)]
        (found,) = [shift for shift, each in enumerate(every) if torch.equal(each, x)]
        shifts.append(found)
    assert min(shifts) < 3 < 12 < max(shifts)


def test_pretrains_exports_and_repeats_to_the_bit(tmp_path, monkeypatch):
    kept = prepared(tmp_path, monkeypatch)
    found = []
    for name in ("one", "two"):
        losses = pretrain(COMPARED["aape"], 0, RECIPE, kept.pretraining, kept.kept, tmp_path / name)
        encoder = load(tmp_path / name)
        assert encoder.frames == 32
        assert losses["steps_per_second"] > 0
        assert losses["tokens/student_rankme"] > 0
        found.append((losses["train/loss"], encoder.encoder.state_dict()))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())
    start = untrained(COMPARED["aape"], 0, RECIPE).objective.teacher.state_dict()
    assert not torch.equal(found[0][1]["layers.0.linear1.weight"], start["layers.0.linear1.weight"])


def test_it_stops_when_the_time_is_over(tmp_path, monkeypatch):
    kept = prepared(tmp_path, monkeypatch)
    with pytest.raises(OutOfTimeError):
        pretrain(COMPARED["conv"], 0, RECIPE, kept.pretraining, kept.kept, tmp_path / "late", until=0.0)
    assert not (tmp_path / "late").exists()


def test_finetunes_keeps_the_best_epoch_and_tests_it(tmp_path, monkeypatch):
    """Tones above and below 1 kHz are learned; what is tested is the best epoch on validation."""
    kept = prepared(tmp_path, monkeypatch)
    of = kept.sets["trill"]
    pretrain(COMPARED["conv"], 0, RECIPE, kept.pretraining, kept.kept, tmp_path / "encoder")
    seen = []
    evaluated = finetuning.FinetuningModule.validation_step

    def look(self, batch, index):
        seen.append(len(batch["index"]))
        return evaluated(self, batch, index)

    monkeypatch.setattr(finetuning.FinetuningModule, "validation_step", look)
    recipe = Recipe(3, 4, 32, epochs=60, tuning_batch_size=4)
    tuned = finetune(tmp_path / "encoder", of.manifest, "0", 0, recipe, kept.of("trill"))
    assert len(tuned.correct) == sum(clip.split == "0" for clip in of.clips)
    assert sum(seen) == 60 * sum(clip.split == "1" for clip in of.clips)
    assert tuned.valid > 0.9
    assert np.mean(tuned.correct) > 0.9
    assert 0 < tuned.epoch < 60


def test_choices_never_see_what_results_test_on(tmp_path, monkeypatch):
    results, chosen = prepared(tmp_path, monkeypatch), prepared(tmp_path, monkeypatch, CHOICES)
    for task, of in results.sets.items():
        own = chosen.sets[task]
        assert {clip.split for clip in own.clips} == {"1", "2", "3", "4"}
        tested = {clip.path for index in range(1) for clip in (of.clips[k] for k in of.rounds[index][2])}
        assert not tested & {clip.path for clip in (*own.clips, *results.pretraining, *chosen.pretraining)}
        ((train, valid, test),) = own.rounds
        folds = [{own.clips[k].split for k in part} for part in (train, valid, test)]
        assert folds == [{"3", "4"}, {"2"}, {"1"}]
        assert not {own.clips[k].path for k in test} & {clip.path for clip in chosen.pretraining}
    assert len(results.pretraining) == 96
    assert len(chosen.pretraining) == 72
    assert results.key != chosen.key


def test_hits_are_counted_by_group(tmp_path, monkeypatch):
    of = prepared(tmp_path, monkeypatch).sets["trill"]
    description = of.description()
    assert (description["groups"], description["counts"]) == (["group 0", "group 5"], [6, 6])
    assert of.hits([1, 0, 1, 0, 0, 0, 1, 1, 1, 1, 1, 0]) == [2, 5]
    assert probe.folds_of(of.clips, ["0"])[0][2].tolist() == of.rounds[0][2].tolist()


def test_grids():
    assert len({each.name for each in sizes()}) == 24
    assert len({each.name for each in adapting()}) == 10
    both = Configuration("both", "aape")
    # 256 H + 2 S H + 256 S + 64 S + 3 S D over 256 D
    expected = 1 + (256 * 32 + 2 * 16 * 32 + 320 * 16 + 3 * 16 * 384) / (256 * 384)
    assert multiply_adds(both, 384) == pytest.approx(expected)
    assert multiply_adds(COMPARED["conv"], 384) == 1
    assert 1.2 < multiply_adds(COMPARED["conv+mlp"], 384) < 1.5
    fixed = Configuration("fixed", "aape-fixed")
    assert multiply_adds(both, 384) - multiply_adds(fixed, 384) == pytest.approx(9216 / (256 * 384))


def test_a_configurations_key_says_what_its_stems_defaults_are(monkeypatch):
    key = COMPARED["aape"].key(16)
    assert key["settled"]["features"] == "both"
    assert (key["settled"]["num_states"], key["settled"]["encoder_dim"]) == (16, 32)
    assert COMPARED["aape-complex"].key(16)["parameters"] < key["parameters"]
    assert not COMPARED["conv"].key(16)["settled"]
    assert isinstance(COMPARED["aape"].make(16), AaPE)
