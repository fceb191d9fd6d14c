"""Where clips come from: what is found, in which order, and what errors name."""

import io
import os
import shutil
import tarfile

import numpy as np
import pytest
import soundfile
import torch

from aape_ssl.demo import command as demo
from aape_ssl.sound import audio
from aape_ssl.sound.sources import Clip, SourceError, find, read_manifest, write_manifest

CLIPS = demo.bundled_clips()


def shard(path, files, **options):
    with tarfile.open(path, options.pop("mode", "w"), **options) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
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
    with pytest.raises(audio.AudioError, match="cut short by the end of its shard"):
        clip.load()
    path.unlink()
    with pytest.raises(audio.AudioError, match="cannot be read from its shard"):
        clip.load()


def test_manifest_round_trip(tmp_path):
    clips = [Clip("a b/é,x.flac", tmp_path / "a b/é,x.flac", "snare", "2", "kit 1"), Clip("y.wav", tmp_path / "y.wav")]
    write_manifest(tmp_path / "set.csv", clips)
    assert read_manifest(tmp_path / "set.csv") == clips
    assert [path.name for path in tmp_path.iterdir()] == ["set.csv"]


def test_manifest_paths_and_splits(tmp_path):
    text = f"label,extra,file,split\nx,1,sub/a.flac,train\n\ny,2,{CLIPS[0]},test\n"
    (tmp_path / "set.csv").write_text("\ufeff" + text, encoding="utf-8")
    first, second = find(tmp_path / "set.csv")
    assert (first.path, first.label, first.split, first.group) == (tmp_path / "sub/a.flac", "x", "train", "")
    assert second.path == CLIPS[0]
    assert find(tmp_path / "set.csv", ["test"]) == [second]
    with pytest.raises(SourceError, match=r"set.csv: holds no clips of splits \['dev'\]; it has \['test', 'train'\]"):
        find(tmp_path / "set.csv", ["dev"])


BAD_MANIFESTS = {
    "": r":1: expected a header with a column `file`, got nothing",
    "path,label\na,b\n": r":1: expected a header with a column `file`, got path,label",
    "file,split,fold\na,1,1\n": r":1: expected a column `split` or `fold`, got both",
    "file,label,label\na,1,1\n": r":1: column label is there 2 times",
    "file,label\na.wav,x\nb.wav\n": r":3: expected 2 cells \(file,label\), got 1",
    "file,label\na.wav,x\nb.wav,y,z\n": r":3: expected 2 cells \(file,label\), got 3",
    "file,label\na.wav,x\n,y\n": r":3: the file column is empty",
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
