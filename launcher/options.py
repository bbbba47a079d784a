"""Command-line options from a function's signature or a dataclass, by argparse, with errors of one line.

A positional parameter without a default, or of a tuple, is a positional argument; the others are options. A dataclass
gives an option for each of its fields, and a nested dataclass a group of them, without a prefix. The help texts are
those of the docstrings.

argparse is used although other libraries do more, because its documented interface is enough to report errors in our
words: it hands every error to `error`. tyro prints a box and exits; its hook for errors is private.
"""

from __future__ import annotations

import argparse
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from docstring_parser import Docstring, parse_from_object

from launcher.config import nearest

NOTHING: Mapping[str, Any] = types.MappingProxyType({})


class Misread(ValueError):
    """A mistake on the command line itself, which every process of a run finds alike."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """How a parameter appears on the command line, in Annotated, if its name and type do not tell."""

    name: str | None = None
    short: str | None = None
    repeated: bool = False  # a list is typed --x A --x B, not --x A B


@dataclass(frozen=True, kw_only=True)
class _Leaf:
    """One option or positional argument."""

    path: str  # names from the target down, joined by dots
    hint: Any
    default: Any  # MISSING: it is required
    help: str
    group: str = ""  # empty: the command's own
    positional: bool = False
    repeated: bool = False


def parse_call(
    function: Callable[..., Any], arguments: Sequence[str], prog: str, known: Mapping[str, Any] = NOTHING
) -> Callable[[], Any]:
    """The call of a function that the arguments describe. known are values of parameters that are not options.

    A parameter whose type has no text form (a console, a stream) is for callers in Python, and not an option. Raises
    Misread.
    """
    doc = parse_from_object(function)
    hints = get_type_hints(function, include_extras=True)
    parameters = [each for each in inspect.signature(function).parameters.values() if each.name not in known]
    leaves: list[_Leaf] = []
    nested: dict[str, tuple[Any, Any]] = {}
    for each in parameters:
        hint, default = hints[each.name], MISSING if each.default is each.empty else each.default
        kind = _plain(hint)[0]
        if is_dataclass(kind):
            nested[each.name] = kind, default
            repeated = _mark(hint).repeated
            leaves += [replace(leaf, repeated=repeated) for leaf in _leaves(kind, default, f"{each.name}.", "")]
        elif _reader(hint) is not None:
            free = each.kind is each.POSITIONAL_OR_KEYWORD and (default is MISSING or _plain(hint)[1])
            text = _help(doc, each.name)
            leaves.append(_Leaf(path=each.name, hint=hint, default=default, help=text, positional=free))
    given = _parse(leaves, arguments, prog, _description(doc))
    values = {name: value for name, value in given.items() if "." not in name}
    for name, (kind, default) in nested.items():
        values[name] = _build(kind, default, given, f"{name}.")
    return partial(function, **values, **known)


def parse_config(default: Any, arguments: Sequence[str], prog: str) -> Any:
    """The dataclass `default` with the fields that the arguments give. Raises Misread."""
    given = _parse(list(_leaves(type(default), default, "", "")), arguments, prog, "")
    return _build(type(default), default, given, "")


def _leaves(kind: Any, default: Any, path: str, group: str) -> Iterator[_Leaf]:
    docs = [parse_from_object(each) for each in kind.__mro__ if is_dataclass(each)]
    hints = get_type_hints(kind, include_extras=True)
    for field in sorted(fields(kind), key=lambda field: is_dataclass(hints[field.name])):
        value = getattr(default, field.name) if default is not MISSING else field.default
        if is_dataclass(hints[field.name]):
            about = (parse_from_object(hints[field.name]).short_description or "").rstrip(".")
            yield from _leaves(hints[field.name], value, f"{path}{field.name}.", f"{field.name}: {about}")
        else:
            help = next(filter(None, (_help(doc, field.name) for doc in docs)), "")
            yield _Leaf(path=path + field.name, hint=hints[field.name], default=value, help=help, group=group)


def _build(kind: Any, default: Any, given: Mapping[str, Any], path: str) -> Any:
    """The dataclass with what was given; its own checks raise ValueError, which is a mistake on the command line."""
    values = {} if default is MISSING else {field.name: getattr(default, field.name) for field in fields(kind)}
    hints = get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            values[field.name] = _build(hints[field.name], values[field.name], given, f"{path}{field.name}.")
        elif path + field.name in given:
            values[field.name] = given[path + field.name]
    try:
        return kind(**values)
    except ValueError as error:
        raise Misread(str(error)) from None


class _Parser(argparse.ArgumentParser):
    """argparse's documented way to handle errors oneself: error() gets the message."""

    def error(self, message: str) -> NoReturn:
        raise Misread(f"{message.removeprefix('argument ')} ({self.prog} --help)")


def _parse(leaves: Sequence[_Leaf], arguments: Sequence[str], prog: str, description: str) -> dict[str, Any]:
    """What was given, by path. Raises Misread; prints the help and exits for --help."""
    names = " ".join(leaf.path.upper() for leaf in leaves if leaf.positional)
    parser = _Parser(
        prog=prog, usage=f"{prog} [options] {names}".rstrip(), description=description, allow_abbrev=False,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=30),
    )  # fmt: skip
    groups: dict[str, Any] = {"": parser}
    known: set[str] = set()
    for leaf in leaves:
        if leaf.group not in groups:
            groups[leaf.group] = parser.add_argument_group(leaf.group)
        known |= set(_add(groups[leaf.group], leaf).option_strings)
    words = [_hyphens(word) for word in arguments]
    found, unknown = (parser.parse_known_intermixed_args if names else parser.parse_known_args)(words)
    if options := [word for word in unknown if word.startswith("-")]:
        name = options[0].partition("=")[0]
        raise Misread(f"unknown option {name}; {nearest(name, known)} ({prog} --help)")
    if unknown:
        raise Misread(f"{' '.join(unknown)!r} belongs to no option ({prog} --help)")
    hints = {leaf.path: leaf.hint for leaf in leaves}
    return {path: _value(hints[path], value) for path, value in vars(found).items() if value is not argparse.SUPPRESS}


def _value(hint: Any, read: Any) -> Any:
    """What argparse read, with a tuple for its list; one value by itself if the type is of one value or several."""
    kinds = [part for part in get_args(hint) if part is not type(None)]
    alone = get_origin(hint) in (Union, types.UnionType) and len(kinds) > 1
    return read[0] if alone and len(read) == 1 else tuple(read) if _plain(hint)[1] else read


def _add(group: Any, leaf: _Leaf) -> argparse.Action:
    kind, several = _plain(leaf.hint)
    mark = _mark(leaf.hint)
    help, name = leaf.help, mark.name or leaf.path.rpartition(".")[2]
    if not (
        leaf.positional or any(leaf.default is empty for empty in (MISSING, None, False)) or leaf.default in ("", ())
    ):
        shown = " ".join(map(str, leaf.default)) if isinstance(leaf.default, (tuple, list)) else leaf.default
        help += f" (default: {shown})"
    settings: dict[str, Any] = {"help": help.replace("%", "%%"), "default": argparse.SUPPRESS}
    if kind is bool:
        flags = [f"--{name.replace('_', '-')}", *([mark.short] if mark.short else [])]
        return group.add_argument(*flags, dest=leaf.path, action=argparse.BooleanOptionalAction, **settings)
    read, metavar = _reader(leaf.hint) or (str, "TEXT")
    settings["type"] = read
    if several:
        settings |= {"action": "append"} if leaf.repeated or mark.repeated else {"nargs": "*"}
    if leaf.positional:
        if not several and leaf.default is not MISSING:
            settings["nargs"] = "?"
        elif several and leaf.default is MISSING:
            settings["nargs"] = "+"
        return group.add_argument(leaf.path, metavar=name.upper(), **settings)
    flag = f"--{name.replace('_', '-')}"
    return group.add_argument(flag, dest=leaf.path, metavar=metavar, required=leaf.default is MISSING, **settings)


def _mark(hint: Any) -> Option:
    return next((mark for mark in getattr(hint, "__metadata__", ()) if isinstance(mark, Option)), Option())


def _plain(hint: Any) -> tuple[Any, bool]:
    """The type of one value, without Annotated and None, and whether it is a list of such values."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [_plain(part) for part in get_args(hint) if part is not type(None)]
        several = any(found for _, found in kinds)
        return (kinds[0][0], several) if len({kind for kind, _ in kinds}) == 1 else (hint, False)
    if get_origin(hint) in (tuple, Sequence):
        return _plain(get_args(hint)[0])[0], True
    return hint, False


def _reader(hint: Any) -> tuple[Callable[[str], Any], str] | None:
    """What reads one value of a type, and its name in the help; None for a type that cannot be typed."""
    kind, _ = _plain(hint)
    if get_origin(kind) is Literal:
        choices = list(dict.fromkeys(map(str, _choices(kind))))
        return partial(_read, dict(zip(choices, choices, strict=True)).__getitem__, f"one of {', '.join(choices)}"), (
            "{" + ",".join(choices) + "}"
        )
    if kind is int:
        return partial(_read, int, "a whole number"), "N"
    if kind is float:
        return partial(_read, float, "a number"), "X"
    if kind is str:
        return partial(_read, _text, "text in UTF-8"), "TEXT"
    return (bool, "") if kind is bool else None


def _choices(kind: Any) -> Iterator[Any]:
    for part in get_args(kind):
        yield from _choices(part) if get_origin(part) is Literal else (part,)


def _read(read: Callable[[str], Any], expected: str, text: str) -> Any:
    try:
        return read(text)
    except (ValueError, KeyError):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None


def _text(word: str) -> str:
    """The word. Raises ValueError if it holds bytes that are no text: such a name can neither be shown nor recorded."""
    word.encode()
    return word


def _hyphens(word: str) -> str:
    """--learning_rate is --learning-rate too."""
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value if word.startswith("--") else word


def _help(doc: Docstring, name: str) -> str:
    texts = [param.description or "" for param in doc.params if param.arg_name == name]
    return " ".join(texts[-1].split()) if texts else ""


def _description(doc: Docstring) -> str:
    return "\n\n".join(filter(None, (doc.short_description, doc.long_description)))
