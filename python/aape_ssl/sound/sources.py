"""Where clips come from: a folder of sound, a CSV manifest, or tar shards as WebDataset writes them."""

from __future__ import annotations

import csv
import glob
import io
import os
import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
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
        name: identifies it, in reports and among the others: its path, or `shard.tar/member`.
        path: of the file, or of the shard that holds it.
        label, split, group: as the manifest says, else ""; a folder's clips are labelled by the folder they lie in.
            Clips of one group (a recording, a syllable, an instrument's samples) belong on one side of any split.
        span: (offset, size) in bytes within a shard.
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

    def check(self) -> None:
        """Check that it exists and looks like sound: by its header if it is a file. Errors: `AudioError`."""
        if self.span is None:
            audio.duration(self.path)
        else:
            self.load(seconds=0.1)

    def load(self, seconds: float | None = None, at: float = 0.0) -> Tensor:
        """Its waveform, as `audio.load` gives it. Errors: `AudioError`."""
        if self.span is None:
            return audio.load(self.path, seconds, at)
        offset, size = self.span
        try:
            with open(self.path, "rb") as shard:
                shard.seek(offset)
                content = shard.read(size)
        except OSError as error:
            raise audio.AudioError(f"cannot be read from its shard ({error.strerror})") from error
        if len(content) < size:
            raise audio.AudioError(f"is cut short by the end of its shard ({len(content)} of {size} bytes)")
        return audio.load(io.BytesIO(content), seconds, at)


def split_name(text: str) -> str:
    """From one of the usual names of a split, in any case, to "train", "valid" or "test"; any other as given."""
    return CANONICAL.get(text.strip().casefold(), text)


def find(source: str | os.PathLike[str], splits: Collection[str] | None = None) -> list[Clip]:
    """The clips of a source, in an order that depends on their names only.

    Args:
        source: a folder, searched recursively for files that end in one of `SUFFIXES`, or for `.tar` shards if it
            holds any; a `.csv` manifest (`read_manifest`); one sound file; one shard; or several by a pattern such
            as `shards/train-*.tar`.
        splits: keep only the manifest's clips of these splits (or folds); all unless given. A folder's or a shard's
            clips have none.

    Errors: `SourceError` for a source that is missing, damaged, or without clips.
    """
    text = os.fspath(source)
    if glob.has_magic(text) and not os.path.exists(text):
        clips = [clip for path in sorted(glob.glob(text)) for clip in _shard(Path(path))]
    elif text.endswith(".csv"):
        clips = read_manifest(text)
    elif os.path.isdir(text):
        clips = list(_folder(Path(text)))
    elif os.path.isfile(text) and Path(text).suffix.lower() in SUFFIXES:
        clips = [Clip(Path(text).name, Path(text))]
    elif os.path.isfile(text) and ".tar" in Path(text).suffixes:
        clips = list(_shard(Path(text)))
    else:
        state = "it is another kind of file" if os.path.exists(text) else "there is no such file or folder"
        raise SourceError(
            f"{text or repr(text)}: expected a folder, a sound file, a .csv manifest or .tar shards, but {state}"
        )
    if not clips:
        raise SourceError(f"{text}: holds no clips (files that end in {', '.join(sorted(SUFFIXES))})")
    if splits is not None:
        present = sorted({clip.split for clip in clips})
        wanted = {split_name(split) for split in splits}
        clips = [clip for clip in clips if split_name(clip.split) in wanted]
        if not clips:
            raise SourceError(f"{text}: holds no clips of splits {sorted(splits)}; it has {present}")
    return clips


def _folder(folder: Path) -> Iterator[Clip]:
    inside = sorted(
        (Path(root, file).relative_to(folder) for root, _, files in os.walk(folder) for file in files),
        key=Path.as_posix,
    )
    shards = [path for path in inside if path.suffix == ".tar"]
    for path in shards:
        yield from _shard(folder / path)
    for path in [] if shards else inside:
        if path.suffix.lower() in SUFFIXES:
            yield Clip(_printable(path.as_posix()), folder / path, label=_printable(path.parent.name))


def _printable(name: str) -> str:
    """A file's name, with bytes that are not UTF-8 as \\xff: reports and manifests hold it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _shard(path: Path) -> Iterator[Clip]:
    """One clip per sound in the archive; `key.cls`, if it has one, is the label of `key.flac`.

    The index of offsets is read here, once, so that clips can be drawn in any order and a resumed run needs no replay.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            members = [member for member in archive if member.isfile()]
            labels = {
                member.name.removesuffix(".cls"): file.read().decode().strip()
                for member in members
                if member.name.endswith(".cls") and (file := archive.extractfile(member))
            }
    except (tarfile.TarError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as an uncompressed tar archive ({error})") from error
    for member in members:
        key, suffix = os.path.splitext(member.name)
        if suffix.lower() in SUFFIXES:
            span = (member.offset_data, member.size)
            yield Clip(f"{path.name}/{member.name}", path, label=labels.get(key, ""), span=span)


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
    doubled = sorted({name for name in columns if columns.count(name) > 1})
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
