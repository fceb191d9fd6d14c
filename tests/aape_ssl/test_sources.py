"""Where clips come from: what is found, in which order, and what errors name."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl._files import replacing
from aape_ssl.demo import command as demo
from aape_ssl.sound import audio
from aape_ssl.sound.sources import Clip, SourceError, find, read_manifest, write_manifest

CLIPS = demo.bundled_clips()


def shard(path, files, links=(), **options):
    """links: (name, type, target), after the files."""
    with tarfile.open(path, options.pop("mode", "w"), **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    return path


def test_one_sound_file():
    (clip,) = find(CLIPS[0])
    assert (clip.name, clip.path) == (CLIPS[0].name, CLIPS[0])


def test_folder_is_searched_and_sorted(tmp_path):
    for name in ("b/two.flac", "a/deep/one.FLAC", "b/notes.txt", "zero.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLIPS[0], tmp_path / name)
    clips = find(tmp_path)
    assert [clip.name for clip in clips] == ["a/deep/one.FLAC", "b/two.flac", "zero.flac"]
    assert [clip.label for clip in clips] == ["deep", "b", ""]
    assert torch.equal(clips[0].load(), audio.load(CLIPS[0]))


def test_shards_hold_the_same_sound(tmp_path):
    files = {f"{path.stem}.flac": path.read_bytes() for path in CLIPS[:3]}
    shard(tmp_path / "train-1.tar", files | {"misc_crow.cls": b"7\n", f"{CLIPS[0].stem}.cls": b"3"})
    shard(tmp_path / "train-0.tar", {f"{CLIPS[4].stem}.flac": CLIPS[4].read_bytes()})
    everything = find(tmp_path)
    assert everything == find(f"{tmp_path}/train-*.tar")
    assert everything[0].name == f"train-0.tar/{CLIPS[4].name}"
    assert everything[1:] == find(tmp_path / "train-1.tar")
    assert [clip.label for clip in everything] == ["", "3", "", ""]
    for clip, path in zip(everything, [CLIPS[4], *CLIPS[:3]], strict=True):
        assert torch.equal(clip.load(), audio.load(path))
        assert torch.equal(clip.load(0.1, at=0.5), audio.load(path, 0.1, at=0.5))


def test_a_shard_that_shrank(tmp_path):
    path = shard(tmp_path / "one.tar", {"a.flac": CLIPS[0].read_bytes()})
    (clip,) = find(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(audio.AudioError, match=r"cannot be read from its shard \(unexpected end of data\)"):
        clip.load()
    path.unlink()
    with pytest.raises(audio.AudioError, match=r"cannot be read from its shard \(No such file"):
        clip.load()


def test_links_in_a_shard_are_the_members_they_lead_to(tmp_path):
    first, second = (path.read_bytes() for path in CLIPS[:2])
    links = [
        ("b/hard.flac", tarfile.LNKTYPE, "./a/x.flac"),
        ("b/soft.flac", tarfile.SYMTYPE, "../a/x.flac"),
        ("b/twice.flac", tarfile.SYMTYPE, "soft.flac"),
        ("b/twice.cls", tarfile.SYMTYPE, "../a/x.cls"),
        ("b/out.flac", tarfile.SYMTYPE, "/data/x.flac"),
        ("b/circle.flac", tarfile.SYMTYPE, "circle.flac"),
    ]
    path = shard(tmp_path / "one.tar", {"./a/x.flac": first, "a/x.cls": b"7", "y.flac": second}, links)
    clips = {clip.name.removeprefix("one.tar/"): clip for clip in find(path)}
    assert list(clips) == ["./a/x.flac", "y.flac", *(name for name, *_ in links if name.endswith(".flac"))]
    for name in ("b/hard.flac", "b/soft.flac", "b/twice.flac"):
        assert torch.equal(clips[name].load(), audio.load(CLIPS[0]))
    assert clips["b/twice.flac"].label == "7"
    with pytest.raises(audio.AudioError, match=r"is a link to /data/x.flac, which its shard lacks"):
        clips["b/out.flac"].load()
    with pytest.raises(audio.AudioError, match=r"is a link to circle.flac, which its shard lacks"):
        clips["b/circle.flac"].load()


def test_sparse_members_are_whole(tmp_path):
    """Header and samples with a hole of zeros between them: the archive holds two pieces and where they lie."""
    samples = np.concatenate([np.full(4000, 0.25), np.zeros(60000), np.full(4000, 0.5)])
    soundfile.write(tmp_path / "a.wav", samples, 16000)
    content = (tmp_path / "a.wav").read_bytes()
    holes = 16384, 16384 + 65536  # bytes of zeros within the middle
    member = tarfile.TarInfo("a.wav")
    member.type, member.size = tarfile.GNUTYPE_SPARSE, len(content) - 65536
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    pieces = [(0, holes[0]), (holes[1], len(content) - holes[1])]
    for at, number in zip(range(386, 434, 12), sum(pieces, ()), strict=True):
        header[at : at + 12] = b"%011o\0" % number
    header[483:495] = b"%011o\0" % len(content)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    stored = content[: holes[0]] + content[holes[1] :]
    (tmp_path / "one.tar").write_bytes(header + stored + bytes(-len(stored) % 512 + 1024))
    shard(tmp_path / "one.tar", {"b.wav": content}, mode="a")
    for clip in find(tmp_path / "one.tar"):
        assert torch.equal(clip.load(), audio.load(tmp_path / "a.wav"))


def test_a_shard_damaged_in_the_middle_is_not_a_shorter_one(tmp_path):
    path = shard(tmp_path / "one.tar", {"a.flac": b"x" * 512, "b.flac": b"y" * 512})
    content = bytearray(path.read_bytes())
    content[1024:1030] = b"damage"
    path.write_bytes(content)
    with pytest.raises(SourceError, match=r"one.tar: cannot be read .*bad header at byte 1024"):
        find(path)


def test_shards_that_were_joined_by_cat_are_refused(tmp_path):
    """What lies behind the end of the first would not be found."""
    first, second = (shard(tmp_path / f"{n}.tar", {f"{n}.flac": b"x" * 512}) for n in "ab")
    (tmp_path / "joined").mkdir()
    path = tmp_path / "joined" / "ab.tar"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(SourceError, match=r"ab.tar: cannot be read .*or another archive behind it"):
        find(path)


def test_a_pattern_of_sound_files_is_refused(tmp_path):
    (tmp_path / "a.wav").touch()
    with pytest.raises(SourceError, match=r"expected a pattern of .tar shards, or sound files' folder, got a.wav"):
        find(tmp_path / "*.wav")


def test_columns_without_a_name_are_left_alone(tmp_path):
    """As spreadsheets write them."""
    (tmp_path / "a.wav").touch()
    (tmp_path / "clips.csv").write_text("file,label,,\na.wav,bird,,\n")
    assert [clip.label for clip in find(tmp_path / "clips.csv")] == ["bird"]


def test_shards_of_one_name_in_two_folders(tmp_path):
    for folder in ("train", "valid"):
        (tmp_path / folder).mkdir()
        shard(tmp_path / folder / "0.tar", {"a.flac": CLIPS[0].read_bytes()})
    names = ["train/0.tar/a.flac", "valid/0.tar/a.flac"]
    assert [clip.name for clip in find(tmp_path)] == names
    assert [clip.name for clip in find(tmp_path / "*" / "0.tar")] == names
    assert [clip.name for clip in find(tmp_path / "train" / "0.t*")] == ["0.tar/a.flac"]


def test_sound_and_shards_in_one_folder_are_refused(tmp_path):
    shutil.copy(CLIPS[0], tmp_path / "a.flac")
    shard(tmp_path / "b.tar", {"c.flac": CLIPS[0].read_bytes()})
    with pytest.raises(SourceError, match=r"got both: 1 of sound, such as a.flac, and 1 shards, such as b.tar"):
        find(tmp_path)


def test_links_to_folders_are_followed_once(tmp_path):
    for name in ("set/a/one.flac", "set/b/two.flac", "other/three.flac"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CLIPS[0], tmp_path / name)
    for link, target in (("c", "other"), ("a/up", "set"), ("0", "set/b"), ("loop", "set/loop")):
        (tmp_path / "set" / link).symlink_to(tmp_path / target)
    assert [clip.name for clip in find(tmp_path / "set")] == ["a/one.flac", "b/two.flac", "c/three.flac"]


def test_a_folder_that_cannot_be_searched(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    shutil.copy(CLIPS[0], tmp_path / "one.flac")
    scandir = os.scandir

    def refused(path):  # as chmod would, but for root too
        if os.fspath(path).endswith("b"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(SourceError, match=r"a/b: cannot be searched \(Permission denied\)"):
        find(tmp_path)


def test_manifest_round_trip(tmp_path):
    clips = [Clip("a b/é,x.flac", tmp_path / "a b/é,x.flac", "snare", "2", "kit 1"), Clip("y.wav", tmp_path / "y.wav")]
    write_manifest(tmp_path / "set.csv", clips)
    assert read_manifest(tmp_path / "set.csv") == clips
    assert [path.name for path in tmp_path.iterdir()] == ["set.csv"]


def test_writers_of_one_path_do_not_meet(tmp_path):
    """And leave alone what lies beside it, whatever its name."""
    (tmp_path / "out.npz.part").write_text("mine")
    with replacing(tmp_path / "out.npz") as first, replacing(tmp_path / "out.npz") as second:
        np.savez(first, x=1)  # would add a suffix that it misses
        np.savez(second, x=2)
    assert np.load(tmp_path / "out.npz")["x"] == 1  # that was finished last
    with replacing(tmp_path / "new" / "folder") as part:
        part.mkdir()
        (part / "file").touch()
    with pytest.raises(OSError, match="new: cannot be written"), replacing(tmp_path / "new") as part:
        part.write_text("no folder")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]
    assert {path.name for path in tmp_path.iterdir()} == {"new", "out.npz", "out.npz.part"}
    assert np.load(tmp_path / "out.npz")["x"] == 1
    assert (tmp_path / "out.npz.part").read_text() == "mine"


def test_manifest_paths_and_splits(tmp_path):
    text = f"label,extra,file,split\nx,1,sub/a.flac,train\n\ny,2,{CLIPS[0]},test\n"
    (tmp_path / "set.csv").write_text("\ufeff" + text, encoding="utf-8")
    first, second = find(tmp_path / "set.csv")
    assert (first.path, first.label, first.split, first.group) == (tmp_path / "sub/a.flac", "x", "train", "")
    assert second.path == CLIPS[0]
    assert find(tmp_path / "set.csv", ["test"]) == [second]
    with pytest.raises(SourceError, match=r"set.csv: holds no clips of splits \['dev'\]; it has \['test', 'train'\]"):
        find(tmp_path / "set.csv", ["dev"])
    with pytest.raises(SourceError, match=r"holds no clips of splits \['unlabelled'\]; it has \['test', 'train'\]"):
        find(tmp_path / "set.csv", ["train", "unlabelled"])
    with pytest.raises(SourceError, match=r"holds no clips of splits \[\]"):
        find(tmp_path / "set.csv", [])
    with pytest.raises(ValueError, match=r"splits: expected names, such as \['train'\], got 'train'"):
        find(tmp_path / "set.csv", "train")


BAD_MANIFESTS = {
    "": r":1: expected a header with a column `file`, got nothing",
    "path,label\na,b\n": r":1: expected a header with a column `file`, got path,label",
    "file,split,fold\na,1,1\n": r":1: expected a column `split` or `fold`, got both",
    "file,label,label\na,1,1\n": r":1: column label is there 2 times",
    "file,label\na.wav,x\nb.wav\n": r":3: expected 2 cells \(file,label\), got 1",
    "file,label\na.wav,x\nb.wav,y,z\n": r":3: expected 2 cells \(file,label\), got 3",
    "file,label\na.wav,x\n,y\n": r":3: the file column is empty",
    # the csv module of Python 3.10 does not read it at all
    "file\nb\0.wav\n": r":2: (the file's name 'b\\x00\.wav' holds a null character|is no CSV)",
    "file\na.wav\nb.wav\na.wav\n": r":4: a.wav is listed already, in line 2",
    'file\n"a.wav"b\n': r":2: is no CSV",
    "file,label\n": ": lists no clips",
    b"file\n\xff\n": ": expected UTF-8, got byte 0xff",
}


@pytest.mark.parametrize("content", BAD_MANIFESTS)
def test_bad_manifest_names_file_and_line(tmp_path, content):
    path = tmp_path / "set.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SourceError, match="set.csv" + BAD_MANIFESTS[content]) as caught:
        read_manifest(path)
    assert "\n" not in str(caught.value)


def test_bad_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("nothing")
    (tmp_path / "no.tar").write_text("nothing at all")
    shard(tmp_path / "packed.tar.gz", {"a.flac": b"x"}, mode="w:gz")
    for source, reason in {
        "missing": "expected a folder, a sound file, a .csv manifest or .tar shards, but there is no such",
        "notes.txt": "expected .*, but it is another kind of file",
        "empty": "holds no clips",
        "none-*.tar": "holds no clips",
        "missing.csv": "cannot be read .No such file",
        "no.tar": "cannot be read as an uncompressed tar",
        "packed.tar.gz": "cannot be read as an uncompressed tar",
    }.items():
        with pytest.raises(SourceError, match=reason) as caught:
            find(tmp_path / source)
        assert str(tmp_path / source) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "file,label,fold, group\na.wav,x,0,g\n",
        "File,LABEL,Fold,Group\na.wav,x,0,g\n",
        " file , label,fold,group \n a.wav , x,0 , g\n",
        "\ufefffile,label,fold,group\r\na.wav,x ,0,g\r\n",
    ],
)
def test_headers_and_cells_are_stripped_and_case_blind(tmp_path, text):
    (tmp_path / "m.csv").write_text(text, encoding="utf-8")
    (clip,) = read_manifest(tmp_path / "m.csv")
    assert (clip.name, clip.path, clip.label, clip.split, clip.group) == ("a.wav", tmp_path / "a.wav", "x", "0", "g")


@pytest.mark.parametrize("again", ["a.wav", "./a.wav", "b/../a.wav", " a.wav"])
def test_one_file_under_two_names(tmp_path, again):
    (tmp_path / "m.csv").write_text(f"file,label\na.wav,x\n{again},y\n")
    with pytest.raises(SourceError, match=r"m.csv:3: .*a.wav is listed already, in line 2"):
        read_manifest(tmp_path / "m.csv")


def test_one_file_by_its_whole_path_too(tmp_path):
    (tmp_path / "m.csv").write_text(f"file,label\na.wav,x\n{tmp_path}/a.wav,y\n")
    with pytest.raises(SourceError, match=r"m.csv:3: .*a.wav is listed already, in line 2"):
        read_manifest(tmp_path / "m.csv")


def test_splits_are_found_under_their_usual_names(tmp_path):
    (tmp_path / "m.csv").write_text("file,split\na.wav,Training\nb.wav,dev\n")
    for asked in ("valid", "val", "DEV"):
        assert [clip.name for clip in find(tmp_path / "m.csv", [asked])] == ["b.wav"]


def test_names_that_are_not_utf8(tmp_path):
    """Printable everywhere, and counted as what cannot be decoded."""
    path = os.fsencode(tmp_path) + b"/b\xff.wav"
    soundfile.write(tmp_path / "a.wav", np.zeros(8000), 16000)
    shutil.copy(tmp_path / "a.wav", path)
    found = find(tmp_path)
    assert [clip.name for clip in found] == ["a.wav", "b\\xff.wav"]
    with pytest.raises(audio.AudioError, match="its name is not UTF-8"):
        found[1].load()
    shard(tmp_path / "one.tar", {"b\udcff.wav": (tmp_path / "a.wav").read_bytes()})
    (clip,) = find(tmp_path / "one.tar")
    assert clip.name == "one.tar/b\\xff.wav"
    assert len(clip.load()) == 8000
