"""One validated place for every knob, and the order in which the command line's sources count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from scheduler.config import EngineConfig
from server.commands.settings import ConfigFileError, plain, settings_for


def read(**knobs: Any) -> EngineConfig:
    return plain(settings_for(EngineConfig)(**knobs), EngineConfig)


def test_arguments_then_environment_then_file_then_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "carousel.yaml"
    file.write_text("max_num_seqs: 1\nmax_batched_tokens: 2\nblock_size: 32\n")
    monkeypatch.setenv("CAROUSEL_MAX_NUM_SEQS", "10")
    monkeypatch.setenv("CAROUSEL_MAX_BATCHED_TOKENS", "20")
    config = read(config=file, max_num_seqs=100)
    assert (config.max_num_seqs, config.max_batched_tokens, config.block_size) == (100, 20, 32)
    assert config.prefix_caching is True


def test_the_file_can_be_named_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "carousel.yaml"
    file.write_text("kv_cache_memory: 2GiB\n")
    monkeypatch.setenv("CAROUSEL_CONFIG", str(file))
    assert read().kv_cache_memory == 2 * 2**30
    assert EngineConfig().kv_cache_memory is None, "the engine itself reads neither environment nor file"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"max_num_seqs": 0}, "greater than or equal to 1"),
        ({"kv_cache_memory": "lots"}, "could not parse value and unit from byte string"),
        ({"dtype": "int3"}, "'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"max_model_len": 1}, "max_model_len must be at least 2"),
        ({"max_nmu_seqs": 3}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_value_is_refused(knobs: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        EngineConfig(**knobs)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "expected `knob: value` lines"), ("a: [", "not valid YAML")]
)
def test_a_file_that_is_no_config_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "carousel.yaml"
    file.write_text(text)
    with pytest.raises(ConfigFileError, match=message):
        read(config=file)
    with pytest.raises(ConfigFileError, match="there is no such file"):
        read(config=tmp_path / "missing.yaml")
