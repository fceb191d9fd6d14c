"""Sound that no task has, to pre-train on: speech and games' effects, cut into pieces about as long as a crop.

    python -m benchmarks.evidence.pool

With the tasks' own sound this is a pool of 8.8 h, of which pre-training sees what nothing is tested on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import re
import struct
import sys
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from aape_ssl.evaluation.embedding import cache_folder
from aape_ssl.sound.audio import SAMPLE_RATE, AudioError, load
from aape_ssl.sound.sources import SUFFIXES, Clip, read_manifest

from .corpora import UNLABELLED, CorpusError, fetch
from .drums import UNDECODABLE
from .tasks import SILENT, Made, keep, left_out

__all__ = ["main", "make_pool", "sounds"]

VERSION = 1  # to be raised whenever other pieces come out
PIECE = round(1.3 * SAMPLE_RATE)  # as a trill is long: 128 frames and no more
SHORTEST = round(0.3 * SAMPLE_RATE)  # as the shortest syllables; of long sound this leaves out some of the ends


def sounds(folder: Path) -> Iterator[tuple[str, Path | BinaryIO]]:
    """Every sound below a folder, and what it is called: files, and what `.pk3` (zip) and OpenTTD's `.cat` files hold.

    Errors: `CorpusError` for an archive that cannot be read.
    """
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix.lower() in SUFFIXES:
            yield name, path
        elif path.suffix in (".pk3", ".cat"):
            inside = _zip if path.suffix == ".pk3" else _cat
            try:
                for member, content in inside(path):
                    yield f"{name}/{member}", io.BytesIO(content)
            except (OSError, zipfile.BadZipFile, struct.error, IndexError) as error:
                raise CorpusError(f"{path}: cannot be read ({error})") from error


def _zip(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.namelist()):
            if Path(member).suffix.lower() in SUFFIXES:
                yield member, archive.read(member)


def _cat(path: Path) -> Iterator[tuple[str, bytes]]:
    """Pairs of offset and size first; at each offset the length of a name, the name, and a RIFF file.

    Source: the package's own file.
    """
    content = path.read_bytes()
    (first,) = struct.unpack_from("<I", content)
    count = (first & 0x7FFFFFFF) // 8  # the highest bit tells the newer kind of file
    for number, (offset, _) in enumerate(struct.iter_unpack("<II", content[: 8 * count])):
        start = (offset & 0x7FFFFFFF) + 1 + content[offset & 0x7FFFFFFF]
        (size,) = struct.unpack_from("<I", content, start + 4)
        yield f"{number}.wav", content[start : start + 8 + size]


def make_pool(cache: Path | None = None) -> Path:
    """The manifest of the pool, made unless the cache has it; a piece's group is the sound that it was cut from.

    Left out are pieces shorter than `SHORTEST`, silence, sound that cannot be decoded, and a second copy of the same.

    Args:
        cache: `cache_folder()` unless given.

    Errors: `CorpusError`.
    """
    cache = cache or cache_folder()
    return keep(cache / "tasks" / f"pool-v{VERSION}", lambda folder: _cut(cache, folder))


def _cut(cache: Path, folder: Path) -> Made:
    import soundfile

    clips: list[Clip] = []
    without: dict[str, str] = {}
    seen: dict[str, str] = {}
    for corpus in UNLABELLED:
        package, before = corpus[0], len(clips)
        for inside, file in sounds(fetch(corpus, cache)):
            name = f"{package}/{inside}"
            try:
                waveform = load(file).numpy()
            except AudioError as error:
                without[name] = f"{UNDECODABLE}: {error}"
                continue
            first = seen.setdefault(hashlib.sha256(waveform.tobytes()).hexdigest(), name)
            if first != name:
                without[name] = f"the same samples as {first}"
                continue
            for at in range(0, len(waveform), PIECE):
                piece = waveform[at : at + PIECE]
                why = "short" if len(piece) < SHORTEST else "silent" if np.abs(piece).max() < SILENT else ""
                if why:
                    without[f"{name} at {at / SAMPLE_RATE:.1f} s"] = f"{why}: {len(piece) / SAMPLE_RATE:.2f} s"
                    continue
                path = folder / f"{package}-{len(clips) - before:05}.flac"
                soundfile.write(path, piece, SAMPLE_RATE, subtype="PCM_16")
                clips.append(Clip(path.name, path, group=name))
    return clips, without


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pool and say how much is in it. Returns 0, or 1 where it could not be made."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.pool", description="Sound that no task has, to pre-train on."
    )
    parser.add_argument("--cache", type=Path, default=cache_folder(), help="(default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        manifest = make_pool(args.cache)
    except CorpusError as error:
        print(f"pool: {error}", file=sys.stderr)
        return 1
    print(manifest)
    seconds: dict[str, float] = defaultdict(float)
    for clip in read_manifest(manifest):
        seconds[clip.group.split("/")[0]] += clip.seconds()
    for package, found in seconds.items():
        print(f"  {package}: {found / 3600:.2f} h")
    why = Counter(re.split(": | as ", each)[0] for each in left_out(manifest).values())
    without = ", ".join(f"{each} {count}" for each, count in why.items())
    print(f"  {sum(seconds.values()) / 3600:.2f} h; left out: {without}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
