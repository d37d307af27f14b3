"""Configuration: frozen dataclasses, read once in ``__main__``; file < environment ``ALBIREO_*`` < flags.

A config class is a frozen dataclass whose fields are made by `flag`. Its parser offers every field as a flag, as an
environment variable and as a key of the TOML file that ``--config`` names.
"""

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

import configargparse

Config = TypeVar("Config")


def flag(default: Any, help: str, choices: Sequence[str] | None = None) -> Any:
    """A dataclass field that is also a command-line flag."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def parse(config_class: type[Config], prog: str, description: str, argv: list[str] | None) -> Config:
    """Reads the configuration of a process; on a bad value prints the reason and exits with status 2."""
    parser = parser_for(config_class, prog, description)
    try:
        return from_namespace(config_class, parser.parse_args(argv))
    except ValueError as error:
        parser.error(str(error))
        raise  # parser.error has exited


def parser_for(config_class: type, prog: str, description: str) -> configargparse.ArgumentParser:
    """The parser of a config class, with ``--config FILE`` (TOML) and ``ALBIREO_*`` variables."""
    parser = configargparse.ArgumentParser(
        prog=prog,
        description=description,
        auto_env_var_prefix="ALBIREO_",
        config_file_parser_class=configargparse.TomlConfigParser(["albireo"]),
        formatter_class=configargparse.ArgumentDefaultsHelpFormatter,
        add_config_file_help=False,
    )
    parser.add_argument("--config", is_config_file=True, metavar="FILE", help="TOML, [albireo] with keys as flags")
    add_flags(parser, config_class)
    return parser


def add_flags(parser: configargparse.ArgumentParser, config_class: type) -> None:
    """Adds one flag per field of ``config_class``."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        if not field.metadata:
            continue
        kind = _plain_type(hints[field.name])
        options: dict[str, Any] = {"help": field.metadata["help"], "default": field.default}
        if kind is bool:
            options["action"] = "store_true"
        else:
            options |= {"type": kind, "choices": field.metadata["choices"]}
            if field.metadata["choices"] is None:
                options["metavar"] = {int: "N", float: "X"}.get(kind, "STR")
        parser.add_argument("--" + field.name.replace("_", "-"), **options)


def from_namespace(config_class: type[Config], namespace: Any) -> Config:
    """Builds the config from parsed arguments; other attributes of the namespace are left alone."""
    names = {field.name for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]  # any dataclass
    return config_class(**{name: value for name, value in vars(namespace).items() if name in names})


def to_argv(config: Any, *names: str) -> list[str]:
    """The flags that give a child process the named fields of ``config``; absent values are left out."""
    argv: list[str] = []
    for name in names:
        value = getattr(config, name)
        if value is None or value is False:
            continue
        argv.append("--" + name.replace("_", "-"))
        if value is not True:
            argv.append(str(value))
    return argv


def _plain_type(hint: Any) -> Any:
    """``int | None`` -> ``int``."""
    if isinstance(hint, types.UnionType):
        return next(arg for arg in typing.get_args(hint) if arg is not type(None))
    return hint
