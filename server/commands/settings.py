"""Where the command line takes its knobs from.

A value comes from the first of: a flag, an environment variable `CAROUSEL_<NAME>`, the YAML file named by `config`
(`--config FILE`), the knob's default.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from scheduler.config import EngineConfig

Config = TypeVar("Config", bound=EngineConfig)


class ConfigFileError(ValueError):
    """The YAML file named by `--config` is missing or is not a mapping."""


class Settings(BaseSettings):
    """Fills the fields of a config class; see `settings_for`."""

    model_config = SettingsConfigDict(env_prefix="CAROUSEL_", cli_kebab_case=True, cli_implicit_flags=True)

    config: Path | None = None
    """YAML file with any of these knobs, named as in the environment but in lower case (max_num_seqs: 64)."""

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _ConfigFile(settings_cls)


def settings_for(config_class: type[Config]) -> type[Settings]:
    """The class that reads a config class's knobs. What it reads, `plain` turns into the config."""
    return cast(type[Settings], type(f"{config_class.__name__}Settings", (Settings, config_class), {}))


def plain(settings: Settings, config_class: type[Config]) -> Config:
    """The knobs alone, without where they came from."""
    return config_class(**{name: getattr(settings, name) for name in config_class.model_fields})


class _ConfigFile(YamlConfigSettingsSource):
    """The YAML source whose path is itself a knob, already known from the sources of higher precedence."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, yaml_file=None)

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config") or os.environ.get("CAROUSEL_CONFIG")
        if not path:
            return {}
        file = Path(path).expanduser()
        if not file.is_file():
            raise ConfigFileError(f"--config {file}: there is no such file")
        try:
            values = self._read_file(file)
        except Exception as error:
            raise ConfigFileError(f"--config {file}: not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigFileError(f"--config {file}: expected `knob: value` lines, not {type(values).__name__}")
        return values
