"""Tasks from small made-up packages, and from the real ones where the cache has them."""

import os
import stat
import struct
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl.demo import command as demo
from aape_ssl.evaluation import embedding
from aape_ssl.sound.sources import find
from benchmarks.evidence import drums, tasks
from benchmarks.evidence.corpora import (
    DRUM_KITS,
    DRUM_KITS_OF_HYDROGEN,
    LMMS,
    SONIC_PI,
    SOUNDFONT,
    VOICE,
    CorpusError,
    fetch,
)
from benchmarks.evidence.soundfont import SoundFontError, Synthesiser, components, samples_of

ROOT = Path(__file__).parents[3]
CLIPS = demo.bundled_clips()
# three families; 1 shares with 0 and, above the melodic programs, 90; 11 with 9; 74 to 76 are one
SHARING = {program: [program] for program in (*range(16), *range(72, 80))}
SHARING |= {1: [0, 1], 11: [11, 9], 74: [74, 75], 75: [75, 76], 90: [1]}
SILENT = 12


def tiny_soundfont(path: Path, sharing: dict[int, list[int]]) -> Path:
    """A font whose programs play these samples, each one period of a sine at its own place in the sample data."""
    length, count = 100, 1 + max(map(max, sharing.values()))
    sine = (8000 * np.sin(2 * np.pi * np.arange(length) / length)).astype("<i2")
    data = b"".join(sine.tobytes() + bytes(92) for _ in range(count))

    def chunk(name: bytes, content: bytes) -> bytes:
        return name + struct.pack("<I", len(content)) + content + bytes(len(content) % 2)

    def name(text: str) -> bytes:
        return text.encode().ljust(20, b"\0")

    presets, preset_bags, preset_generators = b"", b"", b""
    instruments, bags, generators = b"", b"", b""
    zones = 0
    for number, (program, samples) in enumerate(sharing.items()):
        presets += name(f"p{program}") + struct.pack("<HHHIII", program, 0, number, 0, 0, 0)
        preset_bags += struct.pack("<HH", number, 0)
        preset_generators += struct.pack("<HH", 41, number)
        instruments += name(f"i{program}") + struct.pack("<H", zones)
        for sample in samples:
            bags += struct.pack("<HH", 2 * zones, 0)
            generators += struct.pack("<HHHH", 54, 1, 53, sample)  # looped; the sample stands last
            zones += 1
    presets += name("EOP") + struct.pack("<HHHIII", 0, 0, len(sharing), 0, 0, 0)
    preset_bags += struct.pack("<HH", len(sharing), 0)
    instruments += name("EOI") + struct.pack("<H", zones)
    bags += struct.pack("<HH", 2 * zones, 0)
    headers = b""
    for sample in range(count):
        start = sample * (length + 46)
        places = (start, start + length, start, start + length, 44100)
        headers += name(f"s{sample}") + struct.pack("<IIIIIBbHH", *places, 69, 0, 0, 1)
    headers += name("EOS") + struct.pack("<IIIIIBbHH", 0, 0, 0, 0, 0, 0, 0, 0, 0)
    lists = {
        b"phdr": presets,
        b"pbag": preset_bags,
        b"pmod": bytes(10),
        b"pgen": preset_generators + bytes(4),
        b"inst": instruments,
        b"ibag": bags,
        b"imod": bytes(10),
        b"igen": generators + bytes(4),
        b"shdr": headers,
    }
    info = chunk(b"ifil", struct.pack("<HH", 2, 1)) + chunk(b"isng", b"EMU8000\0") + chunk(b"INAM", b"tiny\0\0")
    parts = [b"INFO" + info, b"sdta" + chunk(b"smpl", data)]
    parts.append(b"pdta" + b"".join(chunk(key, content) for key, content in lists.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(chunk(b"RIFF", b"sfbk" + b"".join(chunk(b"LIST", part) for part in parts)))
    return path


@pytest.fixture
def cache(tmp_path):
    """All packages, small: every initial with 6 base syllables in two or three tones by two speakers; 14 kits."""
    tiny_soundfont(tmp_path / "packages" / SOUNDFONT[0] / SOUNDFONT[1], SHARING)
    voice = tmp_path / "packages" / VOICE[0] / VOICE[1]
    for initial in tasks.INITIALS:
        for number, final in enumerate(["ㄚ", "ㄛ", "ㄞ", "ㄠ", "ㄢ", "ㄤ"]):
            for tone in ("", "3", "1")[number % 2 :]:
                (voice / f"{initial}{final}{tone}").mkdir(parents=True)
                for speaker in (3, 5):
                    (voice / f"{initial}{final}{tone}" / f"{speaker}.ogg").touch()
    (voice / "ㄢ4").mkdir()
    (voice / "ㄢ4" / "3.ogg").touch()
    kits = ["GMRockKit", "The Black Pearl 1.0", "Gimme A Hand 1.0", *"ABCDEF", "Millo-Drums_v.1", "Millo_MultiLayered2"]
    for number, kit in enumerate(kits):
        package, inside = DRUM_KITS_OF_HYDROGEN if number < 3 else DRUM_KITS
        folder = tmp_path / "packages" / package / inside / kit
        drumkit(folder, [("Kick", ["kick.wav"]), ("Snare", ["snare.wav"])])
        noise(folder / "kick.wav", 2 * number)
        noise(folder / "snare.wav", 2 * number + 1)
    for number, (package, inside) in enumerate((LMMS, SONIC_PI)):
        folder = tmp_path / "packages" / package / inside
        folder.mkdir(parents=True)
        noise(folder / "kick.wav", 100 + number)
        noise(folder / "snare.wav", 200 + number)
    noise(tmp_path / "packages" / LMMS[0] / LMMS[1] / "zap.wav", 300)
    return tmp_path


class Sines:
    """Stands in for `Synthesiser`, which needs tinysoundfont: key and program as a sine; `SILENT` is."""

    def __init__(self, path):
        assert path.exists()

    def render(self, program, notes, seconds):
        t = torch.arange(round(seconds * 16000)) / 16000
        return 0.1 * torch.sin(2 * torch.pi * (100 + program + notes[0][2]) * t) * (program != SILENT)


def check_disjoint(clips):
    folds = defaultdict(set)
    for clip in clips:
        folds[clip.group].add(clip.split)
    assert all(len(found) == 1 for found in folds.values())
    assert {clip.split for clip in clips} == set("01234")
    return folds


def test_samples_and_components(tmp_path):
    path = tiny_soundfont(tmp_path / "tiny.sf2", SHARING)
    found = samples_of(path)
    assert {program: {start // 146 for start in starts} for program, starts in found.items()} == {
        program: set(samples) for program, samples in SHARING.items()
    }
    assert samples_of(path, bank=128) == {}
    assert components(found) == {program: program for program in SHARING} | {1: 0, 11: 9, 75: 74, 76: 74, 90: 0}
    # a program that joins two that were apart
    assert components({1: {1}, 2: {2}, 3: {3}, 4: {1, 3}}) == {1: 1, 2: 2, 3: 1, 4: 1}
    assert components({5: {1}, 2: {1}}) == {5: 2, 2: 2}


def test_bad_soundfonts(tmp_path):
    path = tiny_soundfont(tmp_path / "tiny.sf2", SHARING)
    content = path.read_bytes()
    for changed, reason in (
        (b"RIFF" + bytes(100), "expected a SoundFont 2 file"),
        (content[:-20], "its shdr chunk is damaged"),
        (content.replace(b"inst", b"tsni"), "lacks the chunk inst"),
    ):
        path.write_bytes(changed)
        with pytest.raises(SoundFontError, match=f"tiny.sf2: {reason}"):
            samples_of(path)
    with pytest.raises(SoundFontError, match=r"missing.sf2: cannot be read \(No such file"):
        samples_of(tmp_path / "missing.sf2")


@pytest.mark.parametrize("task", ["trill", "family"])
def test_soundfont_tasks(cache, monkeypatch, task):
    monkeypatch.setattr(tasks, "Synthesiser", Sines)
    manifest = tasks.make(task, cache, clips=240)
    clips = find(manifest)
    programs = [program for program in SHARING if program < 80]
    folds = check_disjoint(clips)
    assert folds.keys() == {f"program {program}" for program in programs if program not in (1, 11, 75, 76, SILENT)}
    if task == "trill":
        assert {clip.label for clip in clips} == {f"{rate:g}" for rate in tasks.TRILL_RATES}
    else:
        assert all(clip.label == tasks.FAMILIES[int(clip.name[:3]) // 8] for clip in clips)
    seconds = 1.3 if task == "trill" else 1.5
    assert {len(clip.load()) for clip in clips} == {round(16000 * seconds)}
    # deterministic, and another seed is another task
    before = {path.name: path.read_bytes() for path in manifest.parent.iterdir()}
    assert tasks.make(task, cache, clips=240) == manifest
    other = tasks.make(task, cache, seed=1, clips=240)
    manifest.unlink()
    tasks.make(task, cache, clips=240)
    assert {path.name: path.read_bytes() for path in manifest.parent.iterdir()} == before
    assert other.read_text() != manifest.read_text()
    assert sorted(path.name for path in (cache / "tasks").iterdir()) == [f"{task}-v1-seed0-240", f"{task}-v1-seed1-240"]


def test_both_soundfont_tasks_have_the_same_folds(cache, monkeypatch):
    monkeypatch.setattr(tasks, "Synthesiser", Sines)
    trill, family = (
        {clip.name[:3]: clip.split for clip in find(tasks.make(task, cache, clips=120))} for task in ("trill", "family")
    )
    assert len(trill.keys() & family.keys()) > 15
    assert all(trill[program] == family[program] for program in trill.keys() & family.keys())


def test_a_smaller_task_is_part_of_the_whole(cache, monkeypatch):
    monkeypatch.setattr(tasks, "Synthesiser", Sines)
    for task in tasks.TASKS:
        whole, part = (find(tasks.make(task, cache, clips=count)) for count in (150, 50))
        strip = [{(clip.name, clip.label, clip.split, clip.group) for clip in clips} for clips in (whole, part)]
        assert strip[1] <= strip[0]
        assert 10 < len(part) <= 50
        assert len(part) < len(whole) or task == "drums"


def test_initials(cache):
    clips = find(tasks.make("initials", cache))
    assert len(clips) == 21 * 2 * (3 * 3 + 3 * 2)
    folds = check_disjoint(clips)
    assert len(folds) == 21 * 6
    for clip in clips:
        assert clip.path.resolve().exists()
        syllable = clip.path.parent.name
        assert clip.label == syllable[0] == clip.group[0]
        assert clip.group == syllable.rstrip("31")
    for fold in "01234":
        assert {clip.label for clip in clips if clip.split == fold} == set(tasks.INITIALS)


KIT = """<drumkit_info{namespace}><name>k</name><instrumentList>{instruments}</instrumentList></drumkit_info>"""


def drumkit(folder: Path, instruments: list[tuple[str, list[str]]], namespace: str = "") -> None:
    folder.mkdir(parents=True)
    text = "".join(
        f"<instrument><name>{name}</name>"
        + "".join(f"<layer><filename>{file}</filename></layer>" for file in files)
        + "</instrument>"
        for name, files in instruments
    )
    (folder / "drumkit.xml").write_text(KIT.format(namespace=namespace, instruments=text))


def noise(path: Path, seed: int, samples: int = 2000) -> None:
    soundfile.write(path, 0.3 * np.random.default_rng(seed).standard_normal(samples), 16000)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Kick-Softest", "kick"),
        ("drum_bass_hard", "kick"),
        ("PearlSnareRimshot-Med", "snare"),
        ("Snare (Pearl Free Floating Maple 14x3.5)", "snare"),
        ("FloorTom", "tom"),
        ('Ride (Custom, Zagrebin 22")', "ride/bell"),
        ("HatPedal-Hard", "closed hi-hat"),
        ("hhclosed_01", "closed hi-hat"),
        ("FX_Chh_01", "closed hi-hat"),
        ("Sabian Hat Semi-Open", "open hi-hat"),
        ("VP Hat 1 Op", "open hi-hat"),
        ("Zildjian Splash Choke", "crash/splash"),
        ("Bell", "ride/bell"),
        ("SideStick-Soft", "stick/wood"),
        ("Woodblock Lo", "stick/wood"),
        ("Agogo High (Pearl ECB-23)", "cowbell/agogo"),
        ("Finger Snaps", "clap/snap"),
        ("Sangban1 Bell Hit", None),
        ("Hat Low", None),
        ("bass_woodsy_c", None),
        ("Tambourine Pedal (Pearl PTM-10GH)", None),
    ],
)
def test_drums_are_what_they_are_called(name, expected):
    assert drums.classes_of(name) == ({expected} if expected else set())


def test_drum_recordings(tmp_path):
    """A label where file and instruments agree; the rest is left out with the reason."""
    kits, lmms, sonic_pi = (tmp_path / name for name in ("kits", "lmms", "sonic-pi"))
    named = [("Kick", ["a1.wav", "tom1.wav"]), ("Crash/Ride", ["b.wav"]), ("Conga", ["c.wav"]), ("Snare", ["gone.wav"])]
    drumkit(kits / "A", named)
    drumkit(kits / "The Black Pearl 1.0", [("Hat Open", ["h.wav"])], ' xmlns="http://hydrogen.example"')
    (kits / "no kit").mkdir()
    lmms.mkdir()
    sonic_pi.mkdir()
    for seed, path in enumerate(["A/a1.wav", "A/tom1.wav", "A/b.wav", "A/c.wav", "The Black Pearl 1.0/h.wav"]):
        noise(kits / path, seed)
    noise(lmms / "kick9.wav", 0)
    noise(lmms / "snare1.wav", 9, 559)
    noise(lmms / "snare2.wav", 9, 560)
    (lmms / "kick04.ogg").write_bytes(b"RIFF nothing")
    noise(sonic_pi / "loop_amen.wav", 11)
    found = {str(each.path.relative_to(tmp_path)): each for each in drums.recordings([kits], lmms, sonic_pi)}
    assert {path: (each.label, each.group) for path, each in found.items() if each.label} == {
        "kits/A/a1.wav": ("kick", "A"),
        "kits/The Black Pearl 1.0/h.wav": ("open hi-hat", "GMRockKit"),
        "lmms/snare2.wav": ("snare", "lmms"),
    }
    assert {path: each.why for path, each in found.items() if not each.label} == {
        "kits/A/tom1.wav": "called kick and tom",
        "kits/A/b.wav": "called crash/splash and ride/bell",
        "kits/A/c.wav": "of no class",
        "lmms/kick9.wav": "the same samples as ../kits/A/a1.wav",
        "lmms/snare1.wav": "shorter than two frames: 35 ms",
        "lmms/kick04.ogg": found["lmms/kick04.ogg"].why,
        "sonic-pi/loop_amen.wav": "of no class",
    }
    assert found["lmms/kick04.ogg"].why.startswith("cannot be decoded: cannot be read as sound")
    assert not any(each.why for each in found.values() if each.label)


def test_drum_task(cache):
    manifest = tasks.make("drums", cache)
    clips = find(manifest)
    folds = check_disjoint(clips)
    assert folds.keys() == {"GMRockKit", "Millo", *"ABCDEF", "lmms", "sonic-pi"}
    assert {clip.label for clip in clips} == {"kick", "snare"}
    for clip in clips:
        assert clip.path.resolve().exists()
        assert clip.label in clip.path.stem
    assert tasks.left_out(manifest) == {
        "../../packages/lmms-common/usr/share/lmms/samples/drums/zap.wav": "of no class"
    }


def test_tones_are_the_clips_and_folds_of_initials(cache):
    for most in (None, 150):
        initials, tones = (find(tasks.make(task, cache, clips=most)) for task in ("initials", "tones"))
        left = tasks.left_out(tasks.make("tones", cache, clips=most))
        assert set(left.values()) == {"of the neutral tone"}
        of = {clip.path.resolve(): clip for clip in initials}
        assert {clip.path.resolve() for clip in tones} == {path for path in of if not path.parent.name.endswith("1")}
        assert len(left) == len(initials) - len(tones) > 0
        for clip in tones:
            same = of[clip.path.resolve()]
            assert (clip.name, clip.split, clip.group) == (same.name, same.split, same.group)
            assert clip.path.parent.name == clip.group + (clip.label if clip.label != "1" else "")
    assert tasks.TASKS["tones"].held_out == tasks.TASKS["initials"].held_out


def test_what_is_left_out_is_said(cache, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "Synthesiser", Sines)
    folder = cache / "packages" / LMMS[0] / LMMS[1]
    (folder / "kick04.ogg").write_bytes(b"RIFF nothing")
    assert tasks.main(["family", "drums", "--cache", str(cache)]) == 0
    out = capsys.readouterr().out
    assert "left out: silent 75" in out
    assert "left out: cannot be decoded 1, of no class 1" in out
    assert "drums/kick04.ogg: cannot be decoded: cannot be read as sound" in out
    assert len(tasks.left_out(tasks.make("family", cache))) == 75


def test_versions_have_their_own_caches(cache, monkeypatch):
    first = tasks.make("tones", cache)
    monkeypatch.setitem(tasks.TASKS, "tones", replace(tasks.TASKS["tones"], version=2))
    assert tasks.make("tones", cache) != first


def test_sizes():
    """8 rates × 4, and 25 keys × 3 velocities, a program."""
    programs = range(tasks.PROGRAMS)
    assert len({score.name for score in tasks.trill_scores(programs, 0)}) == 80 * 32
    assert len({score.name for score in tasks.family_scores(programs, 0)}) == 80 * 75


def test_trills_have_their_rate():
    for score in tasks.trill_scores([7, 60], seed=3):
        starts = np.array([start for start, *_ in score.notes])
        rate = float(score.label)
        gaps = np.diff(starts)[1:]  # the first note may be cut by the clip's start
        np.testing.assert_allclose(gaps, gaps.mean() if len(gaps) else 0, rtol=1e-6)
        if len(gaps):
            assert abs(1 / gaps.mean() / rate - 1) <= 0.08
        assert starts[0] == 0
        keys = [key for *_, key, _ in score.notes]
        assert len(set(keys)) == 2
        assert keys[::2] == [keys[0]] * len(keys[::2])
        assert 48 <= min(keys) < max(keys) < 79
        assert len(keys) >= 1.3 * 0.92 * rate


def test_a_failed_task_leaves_nothing(cache, monkeypatch):
    class Broken(Sines):
        def render(self, program, notes, seconds):
            raise SoundFontError("broken")

    monkeypatch.setattr(tasks, "Synthesiser", Broken)
    with pytest.raises(SoundFontError, match="broken"):
        tasks.make("trill", cache)
    assert list((cache / "tasks").iterdir()) == []
    for arguments, reason in ((("pitch", cache), "task: expected one of trill"), (("trill", cache, -1), "seed ≥ 0")):
        with pytest.raises(ValueError, match=reason):
            tasks.make(*arguments)


def test_the_command(cache, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "Synthesiser", Sines)
    monkeypatch.setattr(tasks, "SMALL", 50)
    assert tasks.main(["trill", "initials", "--cache", str(cache), "--small"]) == 0
    out = capsys.readouterr().out
    assert "  50 clips in " in out
    paths = [Path(line) for line in out.splitlines() if not line.startswith(" ")]
    counts = [len(find(path)) for path in paths]
    assert 40 < counts[0] <= 50  # without the silent ones
    assert counts[1] == 50
    assert tasks.main(["initials", "pitch", "--cache", str(cache)]) == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 3
    assert captured.err.startswith("pitch: task: expected one of trill, family, initials, tones, drums")


# --- rendering ---


def test_rendered_notes(tmp_path):
    """A looped sine of 441 Hz at key 69: its pitch follows the key, and it sounds where the note is, on every call."""
    pytest.importorskip("tinysoundfont")
    synthesiser = Synthesiser(tiny_soundfont(tmp_path / "tiny.sf2", SHARING))
    notes = [(0.0, 0.25, 69, 100), (0.5, 0.75, 81, 100)]
    got = synthesiser.render(9, notes, 1.0)
    assert got.shape == (16000,)
    quarters = got.unfold(0, 2000, 4000)
    for piece, hz in ((quarters[0], 441), (quarters[2], 882)):
        assert abs(8 * int(torch.fft.rfft(piece * torch.hann_window(2000)).abs().argmax()) - hz) <= 8
    assert float(quarters[0].abs().max()) > 30 * float(got[6000:7900].abs().max())
    synthesiser.render(79, [(0.0, 5.0, 40, 127)], 0.3)  # still sounding at its end
    assert torch.equal(synthesiser.render(9, notes, 1.0), got)
    (tmp_path / "no.sf2").write_bytes(b"nothing")
    with pytest.raises(SoundFontError, match=r"no.sf2: cannot be loaded by tinysoundfont"):
        Synthesiser(tmp_path / "no.sf2")


def test_missing_synthesiser_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tinysoundfont", None)
    with pytest.raises(SoundFontError, match="pip install --no-deps tinysoundfont"):
        Synthesiser(tmp_path / "any.sf2")


# --- packages ---


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def debian(tmp_path, monkeypatch):
    """An apt-get and a dpkg of our own, which need no network."""
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    script(tools, "apt-get", 'echo "$@" > "$3_1_all.deb"; echo "W: unsandboxed" >&2')
    script(tools, "dpkg", f'mkdir -p "$3/{VOICE[1]}/ㄅㄚ" && echo "$@" > "$3/{VOICE[1]}/ㄅㄚ/3.ogg"')
    return tools


def test_fetch_unpacks_once(tmp_path, debian):
    cache = tmp_path / "new" / "cache"
    folder = fetch(VOICE, cache)
    assert folder == cache / "packages" / VOICE[0] / VOICE[1]
    assert (folder / "ㄅㄚ" / "3.ogg").read_text() == f"-x {VOICE[0]}_1_all.deb unpacked\n"
    script(debian, "apt-get", "exit 1")
    assert fetch(VOICE, cache) == folder
    assert [path.name for path in (cache / "packages").iterdir()] == [VOICE[0]]


def test_fetch_says_why_not_in_one_line(tmp_path, debian, monkeypatch):
    script(debian, "apt-get", 'echo "W: a warning" >&2; echo "E: Unable to locate package" >&2; exit 100')
    with pytest.raises(CorpusError, match=r"^gcin-voice: apt-get --quiet download failed: Unable to locate.*lists"):
        fetch(VOICE, tmp_path)
    script(debian, "apt-get", 'touch "$3_1_all.deb"')
    with pytest.raises(CorpusError, match=r"^timgm6mb-soundfont: expected usr/.*sf2 in it, this version .* has none"):
        fetch(SOUNDFONT, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(CorpusError, match=r"^gcin-voice: cannot be put into .*file/packages"):
        fetch(VOICE, tmp_path / "file")
    assert list((tmp_path / "packages").iterdir()) == []
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CorpusError, match=r"^gcin-voice: cannot be fetched here, apt-get was not found"):
        fetch(VOICE, tmp_path)


def test_help_says_what_there_is():
    command = [sys.executable, "-m", "benchmarks.evidence.tasks", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert "trill, family, initials, tones, drums" in done.stdout


def test_real_packages(tmp_path):
    """Where the user's cache has them; counts of the packages that Debian 12 has."""
    packages = embedding.cache_folder() / "packages"
    if not all((packages / name / inside).exists() for name, inside in (SOUNDFONT, VOICE)):
        pytest.skip("the packages are not in the cache: python -m benchmarks.evidence.tasks fetches them")
    (tmp_path / "packages").symlink_to(packages)
    component = components({n: own for n, own in samples_of(fetch(SOUNDFONT)).items() if n < tasks.PROGRAMS})
    assert len(component) == 80
    assert len(set(component.values())) == 52
    initials = find(tasks.make("initials", tmp_path))
    assert len(initials) == 2111
    assert len(check_disjoint(initials)) == 378
    assert len(initials[0].load()) > 1000
    assert Counter(clip.label for clip in find(tasks.make("tones", tmp_path))) == {
        "1": 558,
        "2": 425,
        "3": 524,
        "4": 584,
    }
    if all((packages / name / inside).exists() for name, inside in (DRUM_KITS, DRUM_KITS_OF_HYDROGEN, LMMS, SONIC_PI)):
        found = find(tasks.make("drums", tmp_path))
        assert len(found) == 628
        assert len(check_disjoint(found)) == 13
        assert Counter(clip.label for clip in found) == {
            "kick": 89, "snare": 120, "tom": 96, "closed hi-hat": 69, "open hi-hat": 54, "crash/splash": 53,
            "ride/bell": 60, "stick/wood": 32, "cowbell/agogo": 26, "clap/snap": 29,
        }  # fmt: skip
    pytest.importorskip("tinysoundfont")
    for task, classes in (("trill", 8), ("family", 10)):
        clips = find(tasks.make(task, tmp_path, clips=300))
        check_disjoint(clips)
        assert len({clip.label for clip in clips}) == classes
        assert len(clips) > 290
        assert soundfile.info(clips[0].path).samplerate == 16000
