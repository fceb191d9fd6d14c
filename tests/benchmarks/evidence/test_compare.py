"""The comparison of stems: what it trains on, what it scores, and what it says."""

import numpy as np
import pytest
import yaml

from aape_ssl import demo
from aape_ssl.commands import embed_clips
from aape_ssl.probe import Score
from aape_ssl.sources import Clip, read_manifest
from benchmarks.evidence import compare
from benchmarks.evidence.corpora import CorpusError


def task(folds: str) -> list[Clip]:
    """The bundled clips, one a fold."""
    clips = demo.bundled_clips()
    return [
        Clip(path.name, path, f"label {k % 2}", fold, f"group {k}")
        for k, (path, fold) in enumerate(zip(clips, folds, strict=False))
    ]


def test_the_test_fold_is_in_no_pretraining_and_every_file_once(tmp_path):
    tasks = {"trill": task("01234"), "family": task("01234")}
    found = read_manifest(compare.pretraining_manifest(tasks, tmp_path))
    assert sorted(clip.path.name for clip in found) == sorted(clip.path.name for clip in tasks["trill"][1:])


@pytest.mark.parametrize("stem", compare.STEMS)
def test_features_of_random_weights_have_one_size(stem):
    clips = task("01")
    found = embed_clips(compare.random_weights(stem, 0), clips, compare.FRAMES)
    dim = yaml.safe_load(compare.PRESET.read_text())["model"]["size"][0]
    assert found.shape == (2, 8 * dim)
    assert np.isfinite(found).all()


# four clips are one batch an epoch
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_pretrains_and_resumes(tmp_path):
    manifest = compare.pretraining_manifest({"trill": task("01234")}, tmp_path)
    path = compare.pretrain("aape", manifest, 2, 0, tmp_path, batch_size=4)
    changed = path.stat().st_mtime_ns
    assert compare.pretrain("aape", manifest, 2, 0, tmp_path, batch_size=4) == path
    assert path.stat().st_mtime_ns == changed  # it was done


def score(name: str, correct: list[float]) -> Score:
    return Score(name, "knn", 4, np.array(correct), ("a", "a", "b", "b"))


def test_differences_are_paired_and_averaged_over_seeds():
    scores = [
        score("trill: aape, pre-trained, seed 0", [1, 1, 1, 0]),
        score("trill: conv, pre-trained, seed 0", [1, 0, 0, 0]),
        score("trill: aape, pre-trained, seed 1", [1, 1, 0, 0]),
        score("trill: conv, pre-trained, seed 1", [1, 1, 0, 0]),
        score("trill: aape, random, seed 0", [0, 0, 0, 0]),
    ]
    (line,) = compare.differences(scores)
    assert line.split() == ["trill:", "aape", "−", "conv", "knn", "+25.0%", "+25.0%", "–", "+25.0%"]


def test_one_line_where_the_sound_cannot_be_had(monkeypatch, capsys, tmp_path):
    def refuse(*arguments):
        raise CorpusError("gcin-voice: apt-get was not found")

    monkeypatch.setattr(compare, "make", refuse)
    assert compare.main(["--cache", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "compare: gcin-voice: apt-get was not found\n"
