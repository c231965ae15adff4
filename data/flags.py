"""Flags from a dataclass: a field is a flag, its default the flag's, the docstring under it the help.

Comments of the form `# --- data ---` between the fields are the sections of `--help`.

Input: the dataclass, a command line, and the YAML file that its `--config` names, whose values are defaults
below it. Output: an instance, or `ConfigError` with every problem at once.

    @dataclass
    class Questions:
        batch_size: int = 8
        '''Questions answered at once.'''

    parse_flags(Questions, ["--batch_size", "4"], prog="trainer.generate")     # Questions(batch_size=4)
    parse_flags(Questions, ["--bach_size", "4"], prog="trainer.generate")
    # ConfigError: --bach_size is unknown; did you mean --batch_size?

A flag of several values takes words and lists at commas: `--metrics anls,rouge_l choice`. A field of paths,
which may contain commas, has `metadata={"split_at_commas": False}`: each word is one path.
"""

import argparse
import ast
import difflib
import inspect
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, NoReturn, Protocol, TypeVar, get_args, get_origin

import yaml


class ConfigError(ValueError):
    """The configuration cannot be used; the message holds one line a problem."""


class Settings(Protocol):
    """A dataclass of flags that can say what is wrong with its values, a sentence each."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def problems(self) -> list[str]: ...


T = TypeVar("T", bound=Settings)


def parse_flags(
    kind: type[T], argv: Sequence[str] | None, prog: str, replaced: Mapping[str, str] | None = None
) -> T:
    """Read flags, over the YAML file of `--config`, over the defaults; raise `ConfigError` with all problems.

    replaced: flags that users know from elsewhere → what to use instead.
    """
    replaced = replaced or {}
    usage = f"{prog} [--config FILE] [--flag VALUE …]"
    parser = _Parser(prog=prog, usage=usage, description=inspect.getdoc(kind), allow_abbrev=False)
    parser.add_argument("--config", metavar="FILE", help="YAML file with defaults for the flags below")
    argv = sys.argv[1:] if argv is None else argv
    names = [field.name for field in fields(kind)]
    # Reading the source takes a tenth of a second, which is only worth it where it is shown.
    docs, groups = _field_docs(kind) if {"-h", "--help"} & set(argv) else ({}, {})
    sections = {title: parser.add_argument_group(title) for title in dict.fromkeys(groups.values())}
    for field in fields(kind):
        plain = _plain_type(field.type)
        options: dict[str, Any] = {"nargs": "?", "const": "True"} if plain is bool else {}
        if get_origin(field.type) is tuple:
            options = {"nargs": "+"}
        section = sections[groups[field.name]] if groups else parser
        section.add_argument(
            f"--{field.name}",
            metavar=plain.__name__.upper(),
            help=f"{docs[field.name]} (default: {field.default})".replace("%", "%%") if docs else None,
            default=argparse.SUPPRESS,
            **options,
        )
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    problems = [_explain_unknown(word, names, replaced) for word in unknown if word.startswith("--")]
    problems += [
        f"{word!r} stands alone: every value needs its --flag"
        for before, word in zip(["", *unknown], unknown, strict=False)
        if not word.startswith("--") and not before.startswith("--")
    ]
    path = given.pop("config", None)
    values, file_problems = _read_yaml(Path(path), names, replaced) if path else ({}, [])
    problems += file_problems
    values |= given
    for field in fields(kind):
        if field.name in values:
            try:
                values[field.name] = _convert(
                    values[field.name], field.type, field.metadata.get("split_at_commas", True)
                )
            except ValueError as error:
                problems.append(f"--{field.name} {values[field.name]}: {error}")
                del values[field.name]
    settings = kind(**values)
    problems += settings.problems()
    if problems:
        raise ConfigError("\n".join(problems))
    return settings


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def _explain_unknown(word: str, names: Sequence[str], replaced: Mapping[str, str]) -> str:
    name = word.removeprefix("--").split("=")[0]
    if name in replaced:
        return f"--{name} has no meaning here: {replaced[name]}"
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean --{close[0]}?" if close else "see --help"
    return f"--{name} is unknown; {hint}"


def _read_yaml(
    path: Path, names: Sequence[str], replaced: Mapping[str, str]
) -> tuple[dict[str, Any], list[str]]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        return {}, [f"--config {path}: cannot be read as YAML: {' '.join(str(error).split())}"]
    if not isinstance(content, dict):
        return {}, [f"--config {path}: must hold lines `flag: value`"]
    unknown = [name for name in content if name not in names]
    problems = [f"{path}: {_explain_unknown(f'--{name}', names, replaced)}" for name in unknown]
    return {name: value for name, value in content.items() if name in names}, problems


def _plain_type(annotation: Any) -> type:
    """`int | None` → int, `tuple[str, ...]` → str."""
    return next((t for t in get_args(annotation) if t is not NoneType), annotation)


def _convert(value: Any, annotation: Any, split_at_commas: bool = True) -> Any:
    """A word of the command line or a YAML value → the field's type; ValueError says what was expected."""
    kind = _plain_type(annotation)
    if get_origin(annotation) is tuple:
        words = [str(word) for word in (value if isinstance(value, list) else [value])]
        if not split_at_commas:
            return tuple(words)
        plain = re.compile(r"[\w.,-]+")  # a comma in a regular expression is a part of it
        return tuple(
            name for word in words for name in (word.split(",") if plain.fullmatch(word) else [word])
        )
    if value is None or (kind is not str and str(value).lower() == "none"):
        if NoneType in get_args(annotation):
            return None
        raise ValueError("a value is needed")
    if kind is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() in words:
            return words[str(value).lower()]
        if str in get_args(annotation):  # bool | str: True, False, or a word that the settings check
            return str(value)
        raise ValueError("must be True or False")
    try:
        return kind(str(value))
    except ValueError:
        raise ValueError(f"must be {'a whole number' if kind is int else 'a number'}") from None


def _field_docs(kind: type) -> tuple[dict[str, str], dict[str, str]]:
    """Field → the docstring under it, and the section (`# --- data ---`) above it, read from the source."""
    docs: dict[str, str] = {}
    sections: dict[str, str] = {}
    for parent in kind.__mro__[-2::-1]:  # as dataclasses order fields; without `object`
        source = textwrap.dedent(inspect.getsource(parent))
        matches = [re.match(r"\s*# --- (.+?) -+$", line) for line in source.splitlines()]
        titles = {number: match[1] for number, match in enumerate(matches) if match}
        (body,) = ast.parse(source).body
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                assert isinstance(field.target, ast.Name)
                docs[field.target.id] = " ".join(ast.literal_eval(below.value).split())
                above = [title for line, title in titles.items() if line < field.lineno - 1]
                sections[field.target.id] = above[-1] if above else "options"
    return docs, sections
