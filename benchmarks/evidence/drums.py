"""Drum recordings of Debian's packages: what each is, by what it is called, and which belong together."""

from __future__ import annotations

import hashlib
import os
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aape_ssl.sound.audio import SAMPLE_RATE, AudioError, load
from aape_ssl.sound.sources import SUFFIXES

__all__ = ["DRUMS", "UNDECODABLE", "Recording", "classes_of", "group_of", "names_in_kit", "recordings"]

UNDECODABLE = "cannot be decoded"
SHORTEST = 560  # samples: two frames of 25 ms, 10 ms apart
# what a recording of each class is called, in lower case, without digits
DRUMS = {
    "kick": r"kick|bass ?drum|drum bass|\bbd\b",
    "snare": r"snare|\bsnr?\b",
    "tom": r"\btom|tom\b",
    "closed hi-hat": r"(?=.*(hat|hh|cymbal))(?=.*(close|\bcl\b|pedal|\bpd\b|foot|\bchh\b))",
    "open hi-hat": r"(?=.*(hat|hh|cymbal))(?=.*(open|\bop\b|free|\bohh\b))",
    "crash/splash": r"crash|splash",
    "ride/bell": r"\bride|^bell$|paiste bell",  # not the bells of other instruments
    "stick/wood": r"stick|rim click|\bwood(y| ?block)?\b",
    "cowbell/agogo": r"cow ?bell|agogo",
    "clap/snap": r"\bclap|snap\b|snaps\b",
}
# one author's recordings, or one kit's in several layers: no fold may separate them
TOGETHER = {
    "The Black Pearl 1.0": "GMRockKit",
    "Gimme A Hand 1.0": "GMRockKit",
    "Millo_MultiLayered2": "Millo",
    "Millo_MultiLayered3": "Millo",
    "Millo-Drums_v.1": "Millo",
}


@dataclass(frozen=True)
class Recording:
    """A drum recording.

    Attributes:
        path: of the file.
        label: a key of `DRUMS`; "" where it is left out.
        group: its kit, or the first of the kits that belong together.
        why: it is left out; "" where it is not.
    """

    path: Path
    label: str
    group: str
    why: str = ""


def classes_of(name: str) -> set[str]:
    """The keys of `DRUMS` that a name speaks of; makers in parentheses do not count."""
    name = re.sub(r"\(.*?\)", "", name)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)  # HatClosed
    words = " ".join(re.findall("[a-z]+", name.lower()))
    return {drum for drum, called in DRUMS.items() if re.search(called, words)}


def group_of(kit: str) -> str:
    """The group of a kit."""
    return TOGETHER.get(kit, kit)


def names_in_kit(path: Path) -> dict[str, set[str]]:
    """For each file that a Hydrogen `drumkit.xml` names, the names of the instruments that play it."""
    found: dict[str, set[str]] = defaultdict(set)
    for instrument in ET.parse(path).getroot().iter():
        if _tag(instrument) == "instrument":
            name = next((child.text or "" for child in instrument if _tag(child) == "name"), "")
            for element in instrument.iter():
                if _tag(element) == "filename" and element.text:
                    found[element.text].add(name)
    return dict(found)


def _tag(element: ET.Element) -> str:
    return element.tag.rpartition("}")[2]  # some kits have a namespace, some have none


def _candidates(kits: list[Path], lmms: Path, sonic_pi: Path) -> Iterator[tuple[Path, str, set[str]]]:
    """Every sound file with its kit and all that it is called."""
    for folder in (path for root in kits for path in sorted(root.iterdir()) if (path / "drumkit.xml").exists()):
        names = names_in_kit(folder / "drumkit.xml")
        for path in _sounds(folder):
            yield path, folder.name, {path.stem} | names.get(path.name, set())
    for kit, folder in (("lmms", lmms), ("sonic-pi", sonic_pi)):
        for path in _sounds(folder):
            yield path, kit, {path.stem}


def _sounds(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def recordings(kits: list[Path], lmms: Path, sonic_pi: Path) -> Iterator[Recording]:
    """All sound files of these folders, those that are left out with the reason why.

    A recording has a label where all that it is called, its file and the instruments of its kit that play it, speaks of
    one class. Left out are those of no class or of two, those that cannot be decoded or are shorter than two frames,
    and a second copy of the same samples (GMRockKit and The Black Pearl share 81): it would count twice.

    Args:
        kits: folders of Hydrogen's drum kits, each a folder with a `drumkit.xml`.
        lmms, sonic_pi: folders of sound files.
    """
    seen: dict[str, Path] = {}
    for path, kit, names in _candidates(kits, lmms, sonic_pi):
        found = sorted({drum for name in names for drum in classes_of(name)})
        label, why = "", ""
        if len(found) != 1:
            why = f"called {' and '.join(found)}" if found else "of no class"
        else:
            try:
                samples = load(path).numpy()
            except AudioError as error:
                why = f"{UNDECODABLE}: {error}"
            else:
                first = seen.setdefault(hashlib.sha256(samples.tobytes()).hexdigest(), path)
                if first is not path:
                    why = f"the same samples as {os.path.relpath(first, path.parent)}"
                elif len(samples) < SHORTEST:
                    why = f"shorter than two frames: {1000 * len(samples) / SAMPLE_RATE:.0f} ms"
            label = "" if why else found[0]
        yield Recording(path, label, group_of(kit), why)
