"""Sound that no task has: found in files and archives, cut into pieces, pre-trained on and never tested on."""

import io
import struct
import zipfile

import numpy as np
import pytest
import soundfile
from evidence_case import CLIPS, made

from aape_ssl.evaluation import embedding
from aape_ssl.sound.audio import SAMPLE_RATE
from aape_ssl.sound.sources import find
from benchmarks.evidence import material, pool
from benchmarks.evidence.corpora import UNLABELLED, CorpusError
from benchmarks.evidence.tasks import left_out

SPEECH, DUTCH, LUGARU, MINETEST, OPENTTD, SCORCHED, UFOAI = UNLABELLED


def noise(seconds: float, seed: int) -> np.ndarray:
    return 0.1 * np.random.default_rng(seed).standard_normal(round(seconds * SAMPLE_RATE))


def wav(samples: np.ndarray) -> bytes:
    content = io.BytesIO()
    soundfile.write(content, samples, SAMPLE_RATE, format="WAV")
    return content.getvalue()


def cat(sounds: list[bytes]) -> bytes:
    """As OpenTTD keeps them: offsets, whose highest bit tells the newer kind, then names and files."""
    offset, table, content = 8 * len(sounds), b"", b""
    for number, sound in enumerate(sounds):
        name = f"sound {number}".encode() + b"\0"
        table += struct.pack("<II", offset + len(content) | 1 << 31 * (number % 2 == 0), len(sound))
        content += bytes([len(name)]) + name + sound
    return table + content


@pytest.fixture
def cache(tmp_path):
    """All packages: a long file, one of another's samples, one too short, one of nothing, silence, two archives."""
    folders = {}
    for package, inside in UNLABELLED:
        folders[package] = tmp_path / "packages" / package / inside
        folders[package].mkdir(parents=True)
    long = np.concatenate([noise(1.3, 0), np.zeros(round(1.3 * SAMPLE_RATE)), noise(0.4, 1)])
    speech = folders[SPEECH[0]] / "gods" / "cs"
    speech.mkdir(parents=True)
    soundfile.write(speech / "a.wav", long, SAMPLE_RATE)
    (speech / "none.ogg").write_bytes(b"OggS")
    (speech / "readme.txt").write_text("no sound")
    soundfile.write(folders[DUTCH[0]] / "same.wav", long, SAMPLE_RATE)
    soundfile.write(folders[LUGARU[0]] / "click.wav", noise(0.29, 2), SAMPLE_RATE)
    soundfile.write(folders[MINETEST[0]] / "slow.wav", noise(0.5, 3)[:4000], SAMPLE_RATE // 2)
    (folders[OPENTTD[0]] / "opensfx.cat").write_bytes(cat([wav(noise(0.6, 4)), wav(noise(0.7, 5))]))
    with zipfile.ZipFile(folders[UFOAI[0]] / "0snd.pk3", "w") as archive:
        archive.writestr("sound/doors/open.wav", wav(noise(0.8, 6)))
        archive.writestr("sound/doors.txt", "no sound")
    return tmp_path


def test_pieces(cache):
    manifest = pool.make_pool(cache)
    pieces = find(manifest)
    assert [(piece.name, piece.group, round(piece.seconds(), 2)) for piece in pieces] == [
        (f"{SPEECH[0]}-00000.flac", f"{SPEECH[0]}/gods/cs/a.wav", 1.3),
        (f"{SPEECH[0]}-00001.flac", f"{SPEECH[0]}/gods/cs/a.wav", 0.4),
        (f"{MINETEST[0]}-00000.flac", f"{MINETEST[0]}/slow.wav", 0.5),
        (f"{OPENTTD[0]}-00000.flac", f"{OPENTTD[0]}/opensfx.cat/0.wav", 0.6),
        (f"{OPENTTD[0]}-00001.flac", f"{OPENTTD[0]}/opensfx.cat/1.wav", 0.7),
        (f"{UFOAI[0]}-00000.flac", f"{UFOAI[0]}/0snd.pk3/sound/doors/open.wav", 0.8),
    ]
    np.testing.assert_allclose(pieces[1].load(), noise(0.4, 1), atol=1e-4)
    assert left_out(manifest) == {
        f"{SPEECH[0]}/gods/cs/a.wav at 1.3 s": "silent: 1.30 s",
        f"{SPEECH[0]}/gods/cs/none.ogg": left_out(manifest)[f"{SPEECH[0]}/gods/cs/none.ogg"],
        f"{DUTCH[0]}/same.wav": f"the same samples as {SPEECH[0]}/gods/cs/a.wav",
        f"{LUGARU[0]}/click.wav at 0.0 s": "short: 0.29 s",
    }
    assert "cannot be decoded" in left_out(manifest)[f"{SPEECH[0]}/gods/cs/none.ogg"]
    written = manifest.stat().st_mtime_ns
    assert pool.make_pool(cache).stat().st_mtime_ns == written


@pytest.mark.parametrize(("package", "name"), [(OPENTTD, "opensfx.cat"), (UFOAI, "0snd.pk3")])
def test_a_damaged_archive_is_named_and_leaves_nothing(cache, package, name):
    path = cache / "packages" / package[0] / package[1] / name
    path.write_bytes(path.read_bytes()[:12])
    with pytest.raises(CorpusError, match=f"{name}: cannot be read"):
        pool.make_pool(cache)
    assert list((cache / "tasks").iterdir()) == []


def test_the_command(cache, capsys):
    assert pool.main(["--cache", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "  ufoai-sound: 0.00 h" in out
    assert "left out: silent 1, cannot be decoded 1, the same samples 1, short 1" in out


def test_pretraining_sees_the_pool_and_no_task_does(cache, monkeypatch):
    monkeypatch.setattr(material, "make", lambda task, cache, seed, clips: made(cache / "made", task))
    monkeypatch.setattr(material, "FRAMES", 32)
    without = material.Material.prepare(material.RESULTS, ["trill"], cache)
    with_it = material.Material.prepare(material.RESULTS, ["trill"], cache, pool=True)
    pieces = {piece.path.resolve() for piece in find(pool.make_pool(cache))}
    assert len(without.pretraining) == CLIPS * 4 // 5
    assert with_it.pretraining[: len(without.pretraining)] == without.pretraining
    assert {clip.path for clip in with_it.pretraining[len(without.pretraining) :]} == pieces
    assert with_it.sets["trill"].key == without.sets["trill"].key
    assert with_it.key != without.key
    # of a piece at most a crop counts
    frames = [20] * len(without.pretraining) + [32] * len(pieces)
    assert with_it.hours == pytest.approx(sum(frames) * 0.01 / 3600)
    monkeypatch.setattr(material, "SMALL", 2)
    assert len(material.Material.prepare(material.RESULTS, ["trill"], cache, True, pool=True).pretraining) == 48 + 2


def test_real_packages(tmp_path):
    """Where the user's cache has them; what the packages of Debian 12 hold."""
    packages = embedding.cache_folder() / "packages"
    if not all((packages / name / inside).exists() for name, inside in UNLABELLED):
        pytest.skip("the packages are not in the cache: python -m benchmarks.evidence.pool fetches them")
    count = {name: sum(1 for _ in pool.sounds(packages / name / inside)) for name, inside in UNLABELLED}
    assert count == {
        "fillets-ng-data-cs": 1882,
        "fillets-ng-data-nl": 1616,
        "lugaru-data": 71,
        "minetest-data": 109,
        "openttd-opensfx": 73,
        "scorched3d-data": 125,
        "ufoai-sound": 347,
    }
