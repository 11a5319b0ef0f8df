"""Command-line flags made of the fields of a config class: their names, types, help and defaults."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, Literal, Union, get_args, get_origin

from pydantic import ByteSize, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import CliSettingsSource

from scheduler.config import EngineConfig
from server.commands.settings import Config, plain, settings_for
from server.validation import sentence


class ConfigFlags(Generic[Config]):
    """Adds a config class's flags to a parser, and fills the class from what was parsed.

    A value comes from the first of: flag, environment, config file, default.
    """

    def __init__(self, parser: argparse.ArgumentParser, config_class: type[Config]) -> None:
        self._class = config_class
        self._settings = settings_for(config_class)
        # An empty group does not show.
        self._server_options = parser.add_argument_group("server options")
        self._engine_options = parser.add_argument_group("engine options")
        self._source = CliSettingsSource[Any](
            self._settings,
            root_parser=parser,
            cli_kebab_case=True,
            cli_implicit_flags=True,
            add_argument_method=self._add,
        )

    def read(self, args: argparse.Namespace) -> Config:
        """Raises `pydantic.ValidationError` (which `problems` words) and `ConfigFileError`."""
        return plain(self._settings(_cli_settings_source=self._source(parsed_args=args)), self._class)

    def _add(self, parser: argparse.ArgumentParser, *names: str, **options: Any) -> None:
        """Add one field's flag, with help and metavar for people."""
        name = options["dest"]
        field = self._settings.model_fields[name]
        options["help"] = _help(field)
        if "metavar" in options:
            options["metavar"] = _metavar(name, field.annotation)
        of_server = name in self._class.model_fields and name not in EngineConfig.model_fields
        group = self._server_options if of_server else self._engine_options
        group.add_argument(*names, **options)


def problems(error: ValidationError) -> list[str]:
    """One line for each wrong value, naming its flag."""
    return [sentence(problem, _name(problem)) for problem in error.errors()]


def _name(problem: ErrorDetails) -> str:
    field = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == "extra_forbidden":  # flags and environment cannot: they know only what there is
        return f"{field} in the config file"
    return "--" + field.replace("_", "-")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    match field.default:
        case None:  # the description says what happens by default
            pass
        case bool():
            text += " (default: on)" if field.default else " (default: off)"
        case _:
            text += f" (default: {field.default})"
    return text.replace("%", "%%")


def _metavar(name: str, annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _metavar(name, get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _metavar(name, next(kind for kind in get_args(annotation) if kind is not NoneType))
    if get_origin(annotation) is Literal:
        return "{" + ",".join(get_args(annotation)) + "}"
    metavars: dict[Any, str] = {int: "N", ByteSize: "SIZE", Path: "FILE"}
    return metavars.get(annotation) or name.rpartition("_")[2].upper()
