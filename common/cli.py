"""The command line of an actor: an option for every setting, made from the Settings dataclass alone."""

from __future__ import annotations

import argparse
import difflib
import os
import shutil
import sys
from collections.abc import Collection, Mapping
from typing import Any, Literal, NoReturn, get_origin

from common.errors import ConfigError
from common.settings import FIELDS, KINDS, Settings, bounds, form, parse, unknown_settings, variable

COLUMNS = 80  # at most, however wide the terminal is
EXIT_USAGE = 2
METAVARS = {str: "TEXT", int: "N", float: "N", bool: "1|0", Literal: "WORD"}
EPILOG = """An option wins over its variable. honcho's processes take no options: they read variables and the .env file
beside the Procfile, and `honcho run COMMAND --settings` prints what that gives them."""


def read_settings(arguments: list[str], environ: Mapping[str, str] | None = None) -> Settings:
    """From options and environment. Leaves with exit code 0 after --help and --settings, and with 2 where the options
    are at fault; a faulty variable raises ConfigError."""
    environ = os.environ if environ is None else environ
    parser = _parser()
    known, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(_unknown(unknown))
    texts = vars(known)
    show = texts.pop("settings")
    try:
        options = {name: parse(name, text, called=_option(name)) for name, text in texts.items()}
    except ConfigError as error:
        parser.error(error.message)
    replaced = {variable(name) for name in options}
    others = {key: text for key, text in environ.items() if key not in replaced}
    settings = Settings(**vars(Settings.from_env(others)) | options)
    if show:
        for sentence in unknown_settings(environ):
            print(f"moecule: {sentence} (ignored)", file=sys.stderr)
        print(_table(settings, options, environ))
        parser.exit()
    return settings


def program() -> str:
    """What was typed: `python -m services.gateway`. argparse would call it __main__.py."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return f"python -m {spec.parent}" if spec and spec.parent else os.path.basename(sys.argv[0])


# ---- the options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"moecule: {message}\n(`{self.prog} --help` names all options)\n")


class _Help(argparse.HelpFormatter):
    """Lines of an option's help stay lines; each is wrapped by itself."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=24, width=min(COLUMNS, shutil.get_terminal_size().columns))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return [part for line in text.splitlines() for part in super(_Help, self)._split_lines(line, width)]


def _parser() -> argparse.ArgumentParser:
    prog = program()
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--settings] [--OPTION VALUE ...]",
        description=sys.modules["__main__"].__doc__,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--settings", action="store_true", default=False, help="print the settings in force, and start nothing"
    )
    group = parser.add_argument_group("settings, as options and as environment variables")
    for name, kind in KINDS.items():
        switch: dict[str, Any] = {"nargs": "?", "const": "1"} if kind is bool else {}
        metavar = METAVARS[get_origin(kind) or kind]
        group.add_argument(_option(name), metavar=metavar, help=_help(name).replace("%", "%%"), **switch)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(name: str) -> str:
    field = FIELDS[name]
    values = ", ".join(filter(None, (form(name), bounds(name))))
    return f"{field.metadata['doc']}\n{variable(name)}: {values}; default {_shown(field.default) or 'empty'}"


def _unknown(arguments: list[str]) -> str:
    """The sentence for what the parser did not take."""
    word = next((a for a in arguments if a.startswith("-")), arguments[0]).partition("=")[0]
    if not word.startswith("-"):
        return f"{word!r} is no option: give settings as --name value"
    options = [*map(_option, KINDS), "--settings", "--help"]
    near = difflib.get_close_matches(word.lower().replace("_", "-"), options, n=1)
    return f"{word} is no option" + (f"; did you mean {near[0]}?" if near else "")


# ---- the settings in force


def _table(settings: Settings, options: Collection[str], environ: Mapping[str, str]) -> str:
    """A line a setting: its variable, its value, and where that is from."""

    def source(name: str) -> str:
        if name in options:
            return "option"
        return "environment" if environ.get(variable(name), "").strip() else "default"

    rows = [(variable(name), _shown(getattr(settings, name)), source(name)) for name in KINDS]
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    return "\n".join(f"{name:{left}}  {value:{middle}}  {origin}" for name, value, origin in rows)


def _shown(value: Any) -> str:
    return str(int(value)) if isinstance(value, bool) else str(value)
