"""Command lines as people type them: short answers to mistakes, short help, one name for one thing everywhere."""

from __future__ import annotations

import inspect
import json
import re
import shutil
from argparse import SUPPRESS, Action, ArgumentError
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from ._messages import complain, did_you_mean, one_line

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


class _WithinError(ArgumentError):
    """What the parser of a class among the options has to say: `options` are that class's own."""

    def __init__(self, message: str, options: Collection[str]) -> None:
        super().__init__(None, message)
        self.options = options


class ShortErrors(ArgumentParser):
    """A parser of `aape-ssl command`: a mistake is answered in two lines, which name the option as it is typed."""

    command: str
    names: Mapping[str, str]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = {"formatter_class": _Formatter, "allow_abbrev": False, "prog": f"aape-ssl {self.command}"}
        super().__init__(*args, **kwargs | given)

    def parse_args(self, *args: Any, **kwargs: Any) -> Namespace:  # type: ignore[override]
        """As any parser, but of configurations that are no text, too, it says what is wrong."""
        try:
            return super().parse_args(*args, **kwargs)
        except UnicodeDecodeError as error:  # all that is decoded are configurations
            self.error(f"Problems parsing config: {error}")

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Say what is wrong, and end."""
        options: Collection[str] = self._option_string_actions
        if not self.exit_on_error:  # of a class within: the outer parser knows the options' whole names
            raise _WithinError(message, options) from ex
        prefix = "--"
        while ex:
            if isinstance(ex, _WithinError):
                prefix, message, options = f"{prefix}{_key(message)[0]}.", str(ex), ex.options
            ex = ex.__cause__
        options = [f"{prefix}{option[2:]}" for option in options if option.startswith("--")]
        said = as_typed(_explained(message, options, prefix), self.names)
        raise SystemExit(complain(said, f"`aape-ssl {self.command} --help` lists the options"))


def short(parser: type[Parser], command: str, names: Mapping[str, str] = MappingProxyType({})) -> type[Parser]:
    """A class of parsers like `parser`, for `aape-ssl command`; `names` as for `named`."""
    return type(parser.__name__, (ShortErrors, parser), {"command": command, "names": names})


def as_typed(message: str, names: Mapping[str, str]) -> str:
    """A message that begins with an option, with the shorter of the option's names."""
    shorter = {long: name for name, long in names.items()}
    option, colon, rest = message.partition(": ")
    return f"{shorter.get(option, option)}{colon}{rest}"


def _explained(message: str, options: Collection[str], prefix: str) -> str:
    """jsonargparse's message in the words of the command line; `prefix` begins the options' whole names."""
    if match := re.match(r"[Uu]nrecognized arguments:? (.*)", message):
        unknown = [argument for argument in match[1].split() if argument.startswith("-")]
        return "; ".join(_unknown(one, options) for one in unknown) or f"{match[1]}: expected --option=value"
    key, rest = _key(message)
    if match := re.search(r"the following arguments are required: (.*)", message):
        within = f"{prefix}{key}." if key else prefix
        missing = [f"{within}{name.lstrip('-')}" for name in match[1].split(", ")]
        return f"{', '.join(missing)}: expected, and not given"
    if match := re.match(r"Option '([\w.]+)' is not accepted", message):
        return _unknown(f"{prefix}{match[1]}", options)
    if key:
        return f"{prefix}{key}: {_expected(rest)}"
    if match := re.match(r"(?:Unexpected|Problems parsing) config: (.*)", message):
        what = "a file of options, such as the config.yaml among a run's logs"
        return f"--config: expected {what}, got {match[1][:80]!r}"
    return one_line(message)[:400]


def _key(message: str) -> tuple[str, str]:
    """The option that jsonargparse's message is about, if it names one, and what the message says."""
    match = re.search(r"Parser key \"([\w.]+)\":?\s*", message)
    return (match[1], message[match.end() :]) if match else ("", message)


def _expected(message: str) -> str:
    """What was expected, and what came; types in the order of the annotation."""
    value = re.search(r"(?:Given|Got) value: (.*)", message)
    if "dot import path" in message or "class_path" in message:
        said = "there is no such file, folder or class"
        return f"{said}, got {value[1][:100]}" if value else one_line(message)[:300]
    types = re.findall(r"Expected (?:a |an )?(?:<class '(\w+)'>|typing\.Literal\[(.*?)\]|(\w[\w ]*))", message)
    names = ["".join(kind).replace("'", "") for kind in types]
    names = [name for name in names if name not in ("NoneType", "NoneType type")]
    if value and value[1] == "None":
        return "expected, and not given"
    if not value or not names:
        return one_line(message)[:300]
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
    """`--methods=knn` and `--methods linear,knn` in jsonargparse's notation, `--methods=["linear","knn"]`.

    Quoted: a fold may be called 01, 1e1 or null, which YAML would take for something else.
    """
    arguments: list[str] = []
    for argument in argv:
        if arguments and arguments[-1] in names and not argument.startswith("-"):
            argument = f"{arguments.pop()}={argument}"
        name, given, value = argument.partition("=")
        if given and name in names:
            items = [item.strip(" '\"") for item in value.removeprefix("[").removesuffix("]").split(",")]
            argument = f"{name}={json.dumps([item for item in items if item], ensure_ascii=False)}"
        arguments.append(argument)
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
