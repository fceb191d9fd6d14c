"""`aape-ssl probe`, `embed` and `export`: functions whose arguments are the commands' options."""

from __future__ import annotations

import csv
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch

from .._arguments import as_lists, in_options, short
from .._files import check_new_file, replacing
from .._messages import CheckpointError, complain, one_line
from ..saved.pretrained import AudioEncoder, load
from ..saved.reading import Part
from ..sound.sources import Clip, find
from . import embedding
from . import probe as probes

__all__ = ["COMMANDS", "embed", "export", "main", "probe"]


def _device(name: str | None) -> str:
    if name and name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device: expected cpu, as torch finds no GPU here, got {name}")
    if name and name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu or cuda, got {name}")
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _frames(given: int | None, encoder: AudioEncoder, clips: Sequence[Clip]) -> int:
    """As in pre-training unless given; at most those of the longest clip, as all beyond it would be silence.

    A multiple of the patch's: what is left over is in no token, and windows that follow one another would lose it.
    """
    hop, patch = encoder.front_end.hop, encoder.encoder.patch_size[1]
    if given is None:
        return encoder.frames // patch * patch
    encoder.encoder.check_frames(given)
    if given % patch:
        raise ValueError(f"frames: expected a multiple of {patch}, those of a patch, got {given}")
    if given <= encoder.frames:
        return given
    longest = patch * math.ceil(max(clip.seconds() for clip in clips) / (hop * patch))
    if given > (most := max(longest, encoder.frames // patch * patch)):
        raise ValueError(f"frames: expected at most {most}, as the longest clip has, got {given}")
    return given


def probe(
    checkpoint: str,
    data: str,
    methods: list[Literal["linear", "knn"]] = ["linear", "knn"],  # noqa: B006
    test: list[str | int] = [],  # noqa: B006
    frames: int | None = None,
    baselines: bool = True,
    cache: Path | None = None,
    scores: Path | None = None,
    device: str | None = None,
) -> None:
    """Score frozen embeddings on a labelled set: a linear probe and kNN.

    A clip's embedding is the time-mean of its frequency-concatenated tokens. Linear: logistic regression on
    standardised features, its regularisation chosen on validation, fitted on training and validation. kNN: cosine,
    k = 10, among the training clips. The test clips are seen once. Prints accuracy with its 95 % interval, drawn over
    groups of clips, and the feature size, which accuracy grows with.

    Args:
        checkpoint: of pre-training (its teacher), or an exported folder.
        data: a .csv manifest with the columns file, label, split (train, valid, test) or fold, and group.
        methods: linear, knn.
        test: only the rounds that hold these folds out; all unless given.
        frames: how much of each clip to encode, from its beginning, a multiple of the patch's; as in pre-training
            unless given.
        baselines: score random weights of the same sizes, and log-mel statistics, beside it.
        cache: folder for embeddings; ~/.cache/aape_ssl unless given.
        scores: a .csv to write to, one line per test clip, row and method.
        device: cuda where there is one, unless given.
    """
    encoder, clips = load(checkpoint), find(data)
    probes.check_labels(clips, data)
    probes.warn_of_several(clips, "a probe tells one label a clip")
    if len({clip.label for clip in clips}) < 2:
        raise ValueError(f"data: expected clips with at least two labels, {data} has {len({c.label for c in clips})}")
    if not methods:
        raise ValueError("methods: expected linear, knn or both, got none")
    if scores is not None:
        check_new_file(scores=scores)
    held_out = [str(fold) for fold in test] or None
    frames, where = _frames(frames, encoder, clips), _device(device)
    folder = (cache or embedding.cache_folder()) / "embeddings"

    def cached(key: str, compute: Callable[[], embedding.Floats]) -> embedding.Floats:
        inside = hashlib.sha256(f"{key}\n{os.path.abspath(data)}".encode()).hexdigest()[:24]
        return embedding.cached(folder / f"{inside}.npz", clips, key, compute)

    def embedded(encoder: AudioEncoder, key: str) -> embedding.Floats:
        key = f"{key} {encoder.config} {frames}"
        tokens, front_end = encoder.to(where).tokens, encoder.front_end
        return cached(key, lambda: embedding.embed(tokens, clips, front_end, frames, device=where))

    def rows() -> Iterator[tuple[str, embedding.Floats]]:
        yield Path(checkpoint).name, embedded(encoder, _digest(Path(checkpoint)))
        if baselines:
            yield "random weights", embedded(random_weights(encoder), "random")
            key = f"statistics {encoder.front_end}"
            yield "log-mel statistics", cached(key, lambda: embedding.statistics(clips, encoder.front_end))

    found = [score for name, row in rows() for score in probes.evaluate(name, row, clips, methods, held_out)]
    print(f"{len(clips)} clips, {len({clip.label for clip in clips})} classes, test clips {len(found[0].correct)}")
    print(probes.table(found))
    if scores is not None:
        _write_scores(scores, found)


def random_weights(encoder: AudioEncoder, seed: int = 0) -> AudioEncoder:
    """An untrained encoder of the same sizes and front end."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained = AudioEncoder(**encoder.config)
    return untrained.eval()


def _digest(path: Path) -> str:
    """A digest of the weights, so that embeddings are not taken for those of another training of the same name."""
    content = path / "model.safetensors" if path.is_dir() else path
    return hashlib.sha256(content.read_bytes()).hexdigest()


def _write_scores(path: Path, scores: Sequence[probes.Score]) -> None:
    with replacing(path) as part, open(part, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["row", "method", "features", "group", "correct"])
        for score in scores:
            for group, correct in zip(score.groups, score.correct, strict=True):
                rows.writerow([score.name, score.method, score.size, group, f"{correct:.4g}"])


def embed(
    checkpoint: str,
    data: str,
    out: Path,
    level: Literal["clip", "frame"] = "clip",
    frames: int | None = None,
    batch_size: int = 64,
    device: str | None = None,
) -> int:
    """Write embeddings of whole clips, however long, to an .npz or .parquet file.

    A clip is encoded in consecutive windows, the last one padded with silence. Level frame has one row per column
    of tokens: name, time (its centre, in seconds) and embedding (its tokens, concatenated along frequency); level clip
    has one row per clip, the mean of these, without time. Clips that cannot be decoded are left out and listed, and the
    exit status is 1.

    Args:
        checkpoint: of pre-training (its teacher), or an exported folder.
        data: a sound file, a folder, a .csv manifest, or .tar shards.
        out: the file, which must not exist; .parquet needs pyarrow.
        level: clip or frame.
        frames: length of a window, a multiple of the patch's; as in pre-training unless given.
        batch_size: windows that are encoded together.
        device: cuda where there is one, unless given.
    """
    encoder, clips, where = load(checkpoint), find(data), _device(device)
    frames = _frames(frames, encoder, clips)
    failed = embedding.embed_files(
        encoder.to(where).tokens, clips, encoder.front_end, frames, out, level, batch_size, where
    )
    print(f"{out}: {len(clips) - len(failed)} of {len(clips)} clips")
    complain(*(f"{name}: {why}" for name, why in failed))
    return 1 if failed else 0


def export(checkpoint: str, out: Path, part: Part = "teacher") -> None:
    """Write the encoder of a pre-training as a folder that one line loads.

    The folder holds model.safetensors, config.json and a README.md, and behaves as a timm model: forward_features
    gives tokens, forward their means over time, concatenated along frequency.

    Args:
        checkpoint: of pre-training.
        out: the folder, which must not exist.
        part: teacher (the average of the weights over time) or student.
    """
    if out.exists():
        raise ValueError(f"out: {out} exists already")
    encoder = AudioEncoder.from_checkpoint(checkpoint, part)
    with replacing(out) as folder:
        encoder.save_pretrained(folder)
    print(f'{out}: from aape_ssl.saved.pretrained import AudioEncoder; AudioEncoder.from_pretrained("{out}")')


COMMANDS: dict[str, Callable[..., int | None]] = {"probe": probe, "embed": embed, "export": export}


def main(command: str, argv: Sequence[str]) -> int:
    """Run a command with `argv` and return its exit status: its own, or 2 with one line on stderr."""
    from jsonargparse import ArgumentParser, auto_cli

    arguments, parser = as_lists(argv, ("--methods", "--test")), short(ArgumentParser, command)
    try:
        return auto_cli(COMMANDS[command], args=arguments, as_positional=False, parser_class=parser) or 0
    except BrokenPipeError:  # an OSError that is no complaint: `cli.main` answers it
        raise
    except (CheckpointError, OSError, ValueError) as error:
        return complain(in_options(one_line(error), {"": COMMANDS[command]}))
