"""Where clips come from: a folder of sound, a CSV manifest, or tar shards as WebDataset writes them."""

from __future__ import annotations

import csv
import glob
import io
import os
import posixpath
import tarfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from .._files import replacing
from . import audio

__all__ = ["SUFFIXES", "Clip", "SourceError", "find", "read_manifest", "split_name", "write_manifest"]

SUFFIXES = frozenset({".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"})
SPLITS = ("split", "fold")
ALIASES = {
    "train": ("train", "training"),
    "valid": ("valid", "val", "validation", "validate", "dev", "development"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CANONICAL = {alias: name for name, aliases in ALIASES.items() for alias in aliases}


class SourceError(ValueError):
    """A folder, manifest or shard that cannot be used; the message is one line that names it and says why."""


@dataclass(frozen=True)
class Clip:
    """One sound of a set.

    Attributes:
        name: identifies it, in reports and among the others: its path, or `shard.tar/member`, from the source on.
        path: of the file, or of the shard that holds it.
        label, split, group: as the manifest says, else ""; a folder's clips are labelled by the folder they lie in.
            Clips of one group (a recording, a syllable, an instrument's samples) belong on one side of any split.
        span: (offset of its header, size) in bytes within a shard.
    """

    name: str
    path: Path
    label: str = ""
    split: str = ""
    group: str = ""
    span: tuple[int, int] | None = None

    def seconds(self) -> float:
        """Its length; 0 where it cannot be read."""
        try:
            return audio.duration(self.path) if self.span is None else len(self.load()) / audio.SAMPLE_RATE
        except audio.AudioError:
            return 0.0

    def load(self, seconds: float | None = None, at: float = 0.0) -> Tensor:
        """Its waveform, as `audio.load` gives it. Errors: `AudioError`."""
        file = self.path if self.span is None else io.BytesIO(self._content(self.span[0]))
        return audio.load(file, seconds, at)

    def _content(self, offset: int) -> bytes:
        """Of the member whose header is there, as tarfile reads it: of a sparse one, the archive lacks the zeros."""
        try:
            with open(self.path, "rb") as shard:
                shard.seek(offset)
                with tarfile.open(fileobj=shard, mode="r:") as archive:
                    member = archive.next()
                    if member is None:
                        raise tarfile.ReadError("bad header")
                    if not member.isfile():
                        raise audio.AudioError(f"is a link to {_printable(member.linkname)}, which its shard lacks")
                    return archive.extractfile(member).read()  # type: ignore[union-attr]  # as it is a file
        except (tarfile.TarError, OSError) as error:
            why = getattr(error, "strerror", error)
            raise audio.AudioError(f"cannot be read from its shard ({why})") from error


def split_name(text: str) -> str:
    """From one of the usual names of a split, in any case, to "train", "valid" or "test"; any other as given."""
    return CANONICAL.get(text.strip().casefold(), text)


def find(source: str | os.PathLike[str], splits: Collection[str] | None = None) -> list[Clip]:
    """The clips of a source, in an order that depends on their names only.

    Args:
        source: a folder, searched recursively for files that end in one of `SUFFIXES`, or for `.tar` shards, but not
            for both; a `.csv` manifest (`read_manifest`); one sound file; one shard; or several by a pattern such as
            `shards/train-*.tar`. Links are followed; a folder that several lead to is searched once.
        splits: keep only the manifest's clips of these splits (or folds), each of which it must have; all unless given.
            A folder's or a shard's clips have none.

    Errors: `SourceError` for a source that is missing, damaged, or without clips; `ValueError` for `splits` that are
    one name.
    """
    text = os.fspath(source)
    if isinstance(splits, str):  # a collection of letters
        raise ValueError(f"splits: expected names, such as [{splits!r}], got {splits!r}")
    if glob.has_magic(text) and not os.path.exists(text):
        root = Path(text)
        while glob.has_magic(os.fspath(root)):
            root = root.parent
        paths = sorted(map(Path, glob.glob(text)))
        if sound := [path for path in paths if path.suffix.lower() in SUFFIXES]:
            raise SourceError(f"{text}: expected a pattern of .tar shards, or sound files' folder, got {sound[0].name}")
        clips = [clip for path in paths for clip in _shard(path, path.relative_to(root))]
    elif text.endswith(".csv"):
        clips = read_manifest(text)
    elif os.path.isdir(text):
        clips = list(_folder(Path(text)))
    elif os.path.isfile(text) and Path(text).suffix.lower() in SUFFIXES:
        clips = [Clip(_printable(Path(text).name), Path(text))]
    elif os.path.isfile(text) and ".tar" in Path(text).suffixes:
        clips = list(_shard(Path(text), Path(Path(text).name)))
    else:
        state = "it is another kind of file" if os.path.exists(text) else "there is no such file or folder"
        raise SourceError(
            f"{text or repr(text)}: expected a folder, a sound file, a .csv manifest or .tar shards, but {state}"
        )
    if not clips:
        raise SourceError(f"{text}: holds no clips (files that end in {', '.join(sorted(SUFFIXES))})")
    if splits is not None:
        present = {clip.split for clip in clips}
        missing = [split for split in splits if split_name(split) not in map(split_name, present)]
        if missing or not splits:
            raise SourceError(f"{text}: holds no clips of splits {sorted(missing)}; it has {sorted(present)}")
        wanted = set(map(split_name, splits))
        clips = [clip for clip in clips if split_name(clip.split) in wanted]
    return clips


def _folder(folder: Path) -> Iterator[Clip]:
    inside = sorted((path.relative_to(folder) for path in _files(folder)), key=Path.as_posix)
    shards = [path for path in inside if path.suffix == ".tar"]
    sounds = [path for path in inside if path.suffix.lower() in SUFFIXES]
    if shards and sounds:
        found = f"{len(sounds)} of sound, such as {sounds[0]}, and {len(shards)} shards, such as {shards[0]}"
        raise SourceError(f"{folder}: expected files of sound or shards, got both: {found}")
    for path in shards:
        yield from _shard(folder / path, path)
    for path in sounds:
        yield Clip(_printable(path.as_posix()), folder / path, label=_printable(path.parent.name))


def _files(folder: Path) -> Iterator[Path]:
    """Those at any depth. Links are followed last, so that what lies here has the name it has here."""
    seen: set[str] = set()
    folders, links = [os.fspath(folder)], list[str]()
    while folders or links:
        here = folders.pop() if folders else links.pop(0)
        if (real := os.path.realpath(here)) in seen:  # a second way, or a circle
            continue
        seen.add(real)
        try:
            with os.scandir(here) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif entry.is_symlink() and os.path.isdir(entry.path):
                        links.append(entry.path)
                    else:
                        yield Path(entry.path)
        except OSError as error:
            raise SourceError(f"{here}: cannot be searched ({error.strerror})") from error


def _printable(name: str) -> str:
    """A file's name, with bytes that are not UTF-8 as \\xff: reports and manifests hold it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _shard(path: Path, shown: Path) -> Iterator[Clip]:
    """One clip per sound in the archive, named `shown`/member; `key.cls`, if it has one, is the label of `key.flac`.

    The index of offsets is read here, once, so that clips can be drawn in any order and a resumed run needs no replay.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            # of several members of one name the last counts, as when they are extracted
            members = {
                posixpath.normpath(member.name): member
                for member in archive
                if member.isfile() or member.issym() or member.islnk()
            }
            labels = {
                name.removesuffix(".cls"): file.read().decode().strip()
                for name, member in members.items()
                if name.endswith(".cls")
                and (found := _linked(member, members)).isfile()
                and (file := archive.extractfile(found))
            }
            archive.fileobj.seek(archive.offset)
            for some in iter(partial(archive.fileobj.read, 1 << 20), b""):
                if some.strip(b"\0"):  # tarfile takes a damaged header for the end, and looks at nothing behind it
                    raise tarfile.ReadError(f"bad header at byte {archive.offset}, or another archive behind it")
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as an uncompressed tar archive ({error})") from error
    for name, member in members.items():
        key, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES:
            found = _linked(member, members)
            label, span = labels.get(key, ""), (found.offset, found.size)
            yield Clip(_printable(f"{shown.as_posix()}/{member.name}"), path, label=label, span=span)


def _linked(member: tarfile.TarInfo, members: Mapping[str, tarfile.TarInfo]) -> tarfile.TarInfo:
    """What a member links to in the end, or the last link if that leads out of its archive, or in a circle."""
    for _ in members:  # no way through them is longer
        folder = posixpath.dirname(member.name) if member.issym() else ""
        target = posixpath.normpath(posixpath.join(folder, member.linkname))
        if member.isfile() or target not in members:
            break
        member = members[target]
    return member


def read_manifest(path: str | os.PathLike[str]) -> list[Clip]:
    """The clips of a CSV manifest, in its order.

    Its first line names the columns: `file`, relative to the manifest's folder unless absolute; optionally `label`,
    `split` or `fold`, and `group`, in any case. Others are ignored. Spaces around names and cells do not count.

    Errors: `SourceError` naming the manifest, and the line if a line is at fault. Whether the files exist is not
    checked: a missing one is a clip that cannot be decoded.
    """
    folder = Path(path).parent
    clips: list[Clip] = []
    seen: dict[str, int] = {}  # line of each file, however its path is written
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, strict=True)
            columns = [name.strip().casefold() for name in next(rows, [])]
            split = _split_column(f"{path}:1", columns)
            for row in rows:
                if not row:
                    continue
                line = f"{path}:{rows.line_num}"
                if len(row) != len(columns):
                    raise SourceError(f"{line}: expected {len(columns)} cells ({','.join(columns)}), got {len(row)}")
                cells = dict(zip(columns, map(str.strip, row), strict=True))
                name = cells["file"]
                if not name:
                    raise SourceError(f"{line}: the file column is empty")
                if "\0" in name:
                    raise SourceError(f"{line}: the file's name {name!r} holds a null character")
                where = os.path.abspath(folder / name)
                if where in seen:
                    raise SourceError(f"{line}: {name} is listed already, in line {seen[where]}")
                seen[where] = rows.line_num
                label, group = cells.get("label", ""), cells.get("group", "")
                clips.append(Clip(name, folder / name, label, cells.get(split, ""), group))
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise SourceError(f"{path}: expected UTF-8, got byte {error.object[error.start]:#04x}") from error
    except csv.Error as error:
        raise SourceError(f"{path}:{rows.line_num}: is no CSV ({error})") from error
    if not clips:
        raise SourceError(f"{path}: lists no clips")
    return clips


def _split_column(line: str, columns: list[str]) -> str:
    if "file" not in columns:
        raise SourceError(f"{line}: expected a header with a column `file`, got {','.join(columns) or 'nothing'}")
    doubled = sorted({name for name in columns if name and columns.count(name) > 1})
    if doubled:
        raise SourceError(f"{line}: column {doubled[0]} is there {columns.count(doubled[0])} times")
    found = [name for name in SPLITS if name in columns]
    if len(found) > 1:
        raise SourceError(f"{line}: expected a column `split` or `fold`, got both")
    return found[0] if found else ""


def write_manifest(path: str | os.PathLike[str], clips: Collection[Clip], split: str = "fold") -> None:
    """Write `file,label,fold,group` for `read_manifest`, with each clip's name as `file`.

    Nobody ever finds half a manifest.
    """
    with replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["file", "label", split, "group"])
        rows.writerows([clip.name, clip.label, clip.split, clip.group] for clip in clips)
