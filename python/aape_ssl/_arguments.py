"""Command lines as people type them: short answers to mistakes, short help, one name for one thing everywhere."""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from argparse import SUPPRESS, Action
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ._messages import did_you_mean, one_line

__all__ = ["ShortErrors", "as_lists", "as_typed", "in_options", "named", "retouch", "short"]


VALUES = {"int": "N", "float": "X", "Path": "PATH", "<class 'Path'>": "PATH"}
"""What stands for an option's value, by its type."""


Parser = TypeVar("Parser", bound=ArgumentParser)


class _Formatter(DefaultHelpFormatter):
    """Help without annotations' names: the values if they can be counted, the default if there is one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        columns = min(shutil.get_terminal_size((100, 24)).columns, 110)
        super().__init__(*args, **kwargs | {"max_help_position": 36, "width": columns})  # type: ignore[no-untyped-call]

    def add_argument(self, action: Action) -> None:
        """Add an option unless `retouch` left it out."""
        if not getattr(action, "left_out", False):
            super().add_argument(action)

    def _get_help_string(self, action: Action) -> str:
        text = (action.help or "").rstrip(".")
        if getattr(action, "_jsonargparse_preexpanded_help", False):  # an option without help, the second time
            return text
        if action.required:
            return f"{text} (required)"
        default = action.default
        if default in (None, SUPPRESS, [], {}) or not action.option_strings or isinstance(default, Namespace):
            return text
        shown = str(default).lower() if isinstance(default, bool) else default
        if isinstance(default, list | tuple):
            shown = ", ".join(map(str, default))
        return f"{text} (default: {shown})".strip()

    def _format_action_invocation(self, action: Action) -> str:
        shown = [name for name in action.option_strings if not name.endswith("+")]
        if not shown or action.nargs == 0:
            return super()._format_action_invocation(action)
        kind = (self._get_type_str(action) or "").partition("|")[0]
        value = action.metavar if isinstance(action.metavar, str) else VALUES.get(kind.strip(), "VALUE")
        return f"{', '.join(shown)} {value}"


class ShortErrors:
    """A mixin for jsonargparse's parsers: a mistake is answered in two lines, which name the option as it is typed."""

    command: str
    names: Mapping[str, str]
    _option_string_actions: Mapping[str, Action]

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and end."""
        said = _explained(one_line(message), self._option_string_actions)
        print(f"aape-ssl: {as_typed(said, self.names)}", file=sys.stderr)
        print(f"aape-ssl: `aape-ssl {self.command} --help` lists the options", file=sys.stderr)
        raise SystemExit(2)


def short(parser: type[Parser], command: str, names: Mapping[str, str] = MappingProxyType({})) -> type[Parser]:
    """A class of parsers like `parser`, for `aape-ssl command`; `names` as for `named`."""

    def init(self: Parser, *args: Any, **kwargs: Any) -> None:
        given = {"formatter_class": _Formatter, "allow_abbrev": False, "prog": f"aape-ssl {command}"}
        parser.__init__(self, *args, **kwargs | given)

    return type(parser.__name__, (ShortErrors, parser), {"__init__": init, "command": command, "names": names})


def as_typed(message: str, names: Mapping[str, str]) -> str:
    """A message that begins with an option, with the shorter of the option's names."""
    shorter = {long: name for name, long in names.items()}
    option, colon, rest = message.partition(": ")
    return f"{shorter.get(option, option)}{colon}{rest}"


def _explained(message: str, options: Collection[str]) -> str:
    """jsonargparse's message in the words of the command line."""
    if match := re.match(r"[Uu]nrecognized arguments:? (.*)", message):
        unknown = [argument for argument in match[1].split() if argument.startswith("-")]
        return "; ".join(_unknown(one, options) for one in unknown) or f"{match[1]}: expected --option=value"
    required = re.match(r"the following arguments are required: (.*)", message)
    required = required or re.match(r".*[Kk]ey \"([\w.]+)\" is required", message)
    required = required or re.match(r"Parser key \"([\w.]+)\": Expected .* Got value: None$", message)
    if required:
        missing = [f"--{name.lstrip('-')}" for name in required[1].split(", ")]
        return f"{', '.join(missing)}: expected, and not given"
    if match := re.match(r"(?:Problem with given class_path .*?)?Option '([\w.]+)' is not accepted", message):
        return _unknown(f"--{match[1]}", options)
    if match := re.search(r"Parser key \"([\w.]+)\":? *(.*)", message):
        if "--data" in options and f"--{match[1]}" not in options and "." not in match[1]:  # of the module's class
            return f"--data.{match[1]}: {_expected(match[2])}"
        return f"--{match[1]}: {_expected(match[2])}"
    if match := re.match(r"(?:Unexpected|Problems parsing) config: (.*)", message):
        what = "a file of options, such as the config.yaml among a run's logs"
        return f"--config: expected {what}, got {match[1][:80]!r}"
    return message[:400]


def _expected(message: str) -> str:
    """What was expected, and what came; types in the order of the annotation."""
    value = re.search(r"(?:Given|Got) value: (.*?)(?:\.(?: |$)|$)", message)
    inside = re.search(r"Errors: - (\w+: expected .*?)(?: - Expected |$)", message)  # what the class itself said
    if inside:
        return inside[1][:300]
    if "dot import path" in message or "class_path" in message:
        return f"there is no such file, folder or class, got {value[1][:100]}" if value else message[:300]
    types = re.findall(r"Expected (?:a |an )?(?:<class '(\w+)'>|typing\.Literal\[(.*?)\]|(\w[\w ]*))", message)
    names = ["".join(kind).replace("'", "") for kind in types]
    names = [name for name in names if name not in ("NoneType", "NoneType type")]
    if not value or not names:
        return message[:300]
    return f"expected {' or '.join(dict.fromkeys(names))}, got {value[1][:100]}"


def _unknown(argument: str, options: Collection[str]) -> str:
    name = argument.partition("=")[0]
    near = [option for option in options if option.endswith(f".{name.lstrip('-')}")]  # the last part of a longer name
    return f"{name}: no such option{f'; did you mean {near[0]}?' if near else did_you_mean(name, options)}"


def named(argv: Sequence[str], names: Mapping[str, str]) -> list[str]:
    """Options with the names of other commands replaced by this one's; a `--data` that names a class stays as it is."""
    arguments = list(argv)
    for i, argument in enumerate(arguments):
        name, given, value = argument.partition("=")
        if name in names and not _is_class(value if given else "".join(arguments[i + 1 : i + 2])):
            arguments[i] = f"{names[name]}{given}{value}"
    return arguments


def _is_class(value: str) -> bool:
    """Whether it names a class, or a configuration of one."""
    return bool(re.fullmatch(r"([\w.]+\.)?[A-Z]\w*|\{.*\}|.*\.(yaml|json)", value)) and not Path(value).is_dir()


def as_lists(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """`--methods=knn` and `--methods linear,knn` in jsonargparse's notation, `--methods=[linear,knn]`."""
    arguments: list[str] = []
    for argument in argv:
        before = arguments[-1] if arguments else ""
        if before.lstrip("-") in names and before.startswith("--") and not argument.startswith("-"):
            argument = f"{arguments.pop()}={argument}"
        name, given, value = argument.partition("=")
        wrap = name.lstrip("-") in names and given and not value.startswith("[")
        arguments.append(f"{name}=[{value}]" if wrap else argument)
    return arguments


def in_options(message: str, groups: Mapping[str, Callable[..., Any]]) -> str:
    """An error that begins with an argument's name, as `batch_size: …`, with the name of its option instead,
    `--data.batch_size: …`; `groups` are the callables whose arguments the options set, by prefix."""
    # for a union of classes, jsonargparse says what each of them said
    inside = re.search(r"Does not validate .*- (\w+: expected .*?)(?:; - Expected|$)", message)
    message = inside[1] if inside else message
    name, colon, rest = message.partition(": ")
    for prefix, made in groups.items():
        if colon and name in inspect.signature(made).parameters:
            return f"--{prefix}{name}: {rest}"
    return message


def retouch(parser: ArgumentParser, texts: Mapping[str, str], only: str) -> None:
    """Give options other help texts, and leave the others that begin with `only` out of the help; "" leaves out, too.

    With `SUPPRESS` as their help, written configurations would lack them as well.
    """
    actions: Iterable[Any] = parser._actions
    for action in actions:
        if action.dest in texts or action.dest.startswith(only):
            action.help = texts.get(action.dest, "")
            action.left_out = not action.help
