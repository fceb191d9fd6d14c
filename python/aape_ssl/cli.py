"""`aape-ssl`: the command line. Nothing heavy is imported before a command runs, so that --help is instant."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

from ._messages import complain, did_you_mean

__all__ = ["main"]

DEMO_NEEDS = ("torch", "torchaudio", "soundfile", "soxr", "matplotlib", "anyascii")
SSL_NEEDS = (
    *("torch", "torchaudio", "soundfile", "soxr", "lightning", "jsonargparse", "tensorboard"),
    *("huggingface_hub", "safetensors", "sklearn"),
)
SSL = {
    "pretrain": "pre-train an audio ViT with the AaPE stem on a folder of sound",
    "probe": "score a frozen encoder on a labelled set: linear probe and kNN, beside baselines",
    "finetune": "train a pre-trained encoder further, with a classifier, on a labelled set",
    "embed": "write embeddings of sound files to .npz or .parquet",
    "export": "write a pre-trained encoder as a folder that one line loads",
}


def _lacks(command: str, needed: Sequence[str], extra: str) -> bool:
    """Whether a library is missing; if so, say it in one line."""
    missing = [name for name in needed if find_spec(name) is None]
    if missing:
        clone = f'pip install ".[{extra}]" in a clone of the repository'
        complain(f"{command} needs {', '.join(missing)}: {clone}")
    return bool(missing)


def _seconds(text: str, zero: bool = False) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and (value > 0 or (zero and value == 0))):
        what = "a number of seconds, 0 or more" if zero else "a positive number of seconds"
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return value


class _Parser(argparse.ArgumentParser):
    """A mistake is answered in two lines, like those of the other commands."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end."""
        raise SystemExit(complain(message.removeprefix("argument "), f"`{self.prog} --help` lists the options"))


def _parser() -> tuple[_Parser, _Parser]:
    """The parsers of all commands, and of the demo."""
    from importlib.metadata import version

    parser = _Parser(prog="aape-ssl", description="Audio representation learning with the AaPE stem.")
    parser.add_argument("--version", action="version", version=f"aape-ssl {version('aape-kernels')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        allow_abbrev=False,
        help="look at sound files through the AaPE stem",
        description="Takes sound files through log-mel spectrogram and AaPE stem to tokens. Prints one table row a "
        "clip: length, tokens, tokens/s of AaPE on every backend that runs here and of the plain Conv2d stem, and the "
        "share of modulation energy that the patch grid aliases. Writes one picture a clip: the spectrogram, the "
        "strongest state of every patch, the energy over frequency, and the strongest kernels. White rows low in a "
        "spectrogram are mel filters so narrow that the frequencies of the Fourier transform nearly miss them.",
        epilog="Exit status: 0, 1 if some clips could not be used, 2 if nothing could be done.",
    )
    demo.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="wav, flac, ogg or mp3, any sampling rate, mono or stereo; or a folder, a .csv manifest or .tar shards of "
        "them (default: the clips that come along)",
    )
    demo.add_argument(
        "--data",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="the same, as the other commands call it",
    )
    demo.add_argument(
        "--checkpoint",
        type=Path,
        metavar="PATH",
        help="of aape-ssl pretrain (its teacher), a folder of aape-ssl export or finetune, or a stem's state dict from "
        "torch.save or as .safetensors, alone or in a model's (default: an untrained stem, a fixed filter bank)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo-output"),
        metavar="DIR",
        help="folder for the pictures (default: %(default)s)",
    )
    demo.add_argument(
        "--seconds",
        type=_seconds,
        default=10.0,
        metavar="S",
        help="how much of each clip to analyse; one picture shows up to 32 s (default: %(default)g)",
    )
    demo.add_argument(
        "--start",
        type=partial(_seconds, zero=True),
        default=0.0,
        metavar="S",
        help="where in each clip to begin (default: %(default)g)",
    )
    for command, does in SSL.items():
        commands.add_parser(command, add_help=False, help=does)  # jsonargparse parses their arguments
    return parser, demo


def _ssl(command: str, argv: Sequence[str]) -> int:
    if _lacks(command, SSL_NEEDS, "ssl"):
        return 2
    if command in ("pretrain", "finetune"):
        from .training import commands as trainings
        from .training.runs import main as train

        return train(trainings.Pretrain if command == "pretrain" else trainings.Finetune, argv)
    from .evaluation import commands

    return commands.main(command, argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` names (`sys.argv` unless given) and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(argv)
        finally:  # at the interpreter's end it would be too late to answer
            if sys.stdout:
                sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except KeyboardInterrupt:  # while libraries were imported, say
        complain("interrupted")
        return 130


def _run(argv: Sequence[str]) -> int:
    if argv and argv[0] in SSL:
        return _ssl(argv[0], argv[1:])
    parser, of_the_demo = _parser()
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].partition("=")[0]
        of_the_demo.error(f"{name}: no such option{did_you_mean(name, of_the_demo._option_string_actions)}")
    if _lacks("the demo", DEMO_NEEDS, "demo"):
        return 2
    from .demo import command as demo

    return demo.run(
        [*args.files, *args.data], checkpoint=args.checkpoint, out=args.out, seconds=args.seconds, start=args.start
    )


if __name__ == "__main__":
    sys.exit(main())
