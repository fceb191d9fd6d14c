"""Real sound by Debian package name, in a cache: nothing is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from aape_ssl.evaluation.embedding import cache_folder

__all__ = [
    "DRUM_KITS",
    "DRUM_KITS_OF_HYDROGEN",
    "LMMS",
    "SONIC_PI",
    "SOUNDFONT",
    "UNLABELLED",
    "VOICE",
    "CorpusError",
    "fetch",
]

# package and where in it the sound lies; licences are in the package's usr/share/doc
SOUNDFONT = ("timgm6mb-soundfont", "usr/share/sounds/sf2/TimGM6mb.sf2")  # 5.4 MB: 128 General MIDI programs
VOICE = ("gcin-voice", "usr/share/gcin-voice/ogg")  # 7.7 MB: 2,358 Mandarin syllables by two speakers
# 143, 7, 8 and 22 MB: one-shots of drums and percussion
DRUM_KITS = ("hydrogen-drumkits", "usr/share/hydrogen/data/drumkits")
DRUM_KITS_OF_HYDROGEN = ("hydrogen-data", "usr/share/hydrogen/data/drumkits")
LMMS = ("lmms-common", "usr/share/lmms/samples/drums")
SONIC_PI = ("sonic-pi-samples", "usr/share/sonic-pi/samples")
# to pre-train on, of no task: 3.4 h of acted speech (39 and 33 MB) and 1.2 h of games' effects and music (97 MB)
UNLABELLED = (
    ("fillets-ng-data-cs", "usr/share/games/fillets-ng/sound"),
    ("fillets-ng-data-nl", "usr/share/games/fillets-ng/sound"),
    ("lugaru-data", "usr/share/games/lugaru/Sounds"),
    ("minetest-data", "usr/share/games/minetest/games"),
    ("openttd-opensfx", "usr/share/games/openttd/baseset/opensfx"),
    ("scorched3d-data", "usr/share/games/scorched3d/data/globalmods"),
    ("ufoai-sound", "usr/share/games/ufoai/base"),
)


class CorpusError(RuntimeError):
    """A package that cannot be fetched; the message is one line that names it and says why."""


def fetch(corpus: tuple[str, str], cache: Path | None = None) -> Path:
    """The sound of a package: from the cache, else by `apt-get download` and `dpkg -x` into it.

    Unpacked beside its place and then moved there, so that no half of a package is ever found.

    Args:
        corpus: a package and where its sound lies in it, such as `SOUNDFONT`.
        cache: `cache_folder()` unless given.

    Errors: `CorpusError`.
    """
    package, inside = corpus
    target = (cache or cache_folder()) / "packages" / package
    if (target / inside).exists():
        return target / inside
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        raise CorpusError(f"{package}: cannot be fetched here, {missing[0]} was not found (it is a Debian package)")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{package}-") as folder:
            _run(package, ["apt-get", "--quiet", "download", package], folder)
            (archive,) = Path(folder).glob("*.deb")
            _run(package, ["dpkg", "-x", archive.name, "unpacked"], folder)
            if not (Path(folder) / "unpacked" / inside).exists():
                raise CorpusError(f"{package}: expected {inside} in it, this version ({archive.name}) has none")
            shutil.rmtree(target, ignore_errors=True)
            os.replace(Path(folder) / "unpacked", target)
    except OSError as error:
        raise CorpusError(f"{package}: cannot be put into {target.parent} ({error.strerror})") from error
    return target / inside


def _run(package: str, command: list[str], folder: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired as error:
        raise CorpusError(f"{package}: {command[0]} was not done in 10 minutes") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines()
        why = lines[0].removeprefix("E: ") if lines else f"status {done.returncode}"
        raise CorpusError(f"{package}: {' '.join(command[:-1])} failed: {why} (are apt's package lists up to date?)")
