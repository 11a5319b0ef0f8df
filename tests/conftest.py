"""What all tests share: the default model, prompts, and what transformers' own `generate` answers to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import PreTrainedModel
from xdist.scheduler import LoadFileScheduling  # type: ignore[import-untyped]

import scheduler
from scheduler.config import DEFAULT_MODEL

if TYPE_CHECKING:
    from tests.server.serving import Server

ALICE = (Path(scheduler.__file__).parent / "data" / "alice.txt").read_text()
NUM_TOKENS = 24
TIE = 1e-4
"""Two logits closer than this are a tie: another order of the same float32 sums may pick either."""


@dataclass(frozen=True)
class Reference:
    """A greedy continuation, and how far apart the two best logits were at each of its tokens."""

    tokens: list[int]
    margins: list[float]


def reference(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> Reference:
    """What transformers' `generate` gives for this prompt alone."""
    output = model.generate(  # type: ignore[operator]
        torch.tensor([prompt], device=model.device),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64, device=model.device),
        max_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.cat(output.logits).float().topk(2, dim=-1).values
    return Reference(output.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist())


def count_ties(ours: list[list[int]], references: list[Reference]) -> int:
    """Assert that each of our continuations is the reference's, up to the first tie; return how many ties were
    decided otherwise."""
    ties = 0
    for number, (tokens, expected) in enumerate(zip(ours, references, strict=True)):
        for place, (token, right, margin) in enumerate(
            zip(tokens, expected.tokens, expected.margins, strict=True)
        ):
            if token != right:
                assert margin < TIE, f"prompt {number}, token {place}: {token}, not {right} (margin {margin:.2g})"
                ties += 1
                break
    return ties


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="also what takes long")


GROUPS = {
    "a model that calls": (
        "test_tools",
        "test_tool_kinds",
        "test_responses",
        "test_messages",
        "test_stream_is_whole",
        "test_service",
    ),
    "users": ("test_users", "test_ledger", "test_live", "test_limits", "test_local_safety"),
    "a load that Prometheus watches": ("test_queries", "test_rules", "test_metrics_page", "test_figures"),
    "float32": (
        "test_exactness",
        "test_checkpoint",
        "test_completion_fields",
        "test_beam_search",
        "test_embeddings",
    ),
}
"""Files that share what takes long to start, which one worker runs; other files go where there is room."""

LONGEST = (
    "test_tools", "test_exactness", "test_users", "test_supervision", "test_lifecycle", "test_gemm",
    "test_queries", "test_decoder", "test_families", "test_not_numbers", "test_model_states", "test_loading",
    "test_llm", "test_async_engine", "test_model_source",
)  # fmt: skip
"""The files that take longest, which are begun first: at the end no worker is to wait for another."""


class ByServers(LoadFileScheduling):  # type: ignore[misc]
    """A worker takes all the files of a group."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((group for group, names in GROUPS.items() if Path(file).stem in names), file)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByServers:
    return ByServers(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))
    if not config.getoption("--prove"):
        for item in items:
            if item.get_closest_marker("prove"):
                item.add_marker(pytest.mark.skip(reason="`make prove` runs it"))


@pytest.fixture(scope="session")
def model_path() -> str:
    """The default model's folder; the first use downloads it."""
    from scheduler.models.files.model_source import resolve_model

    return resolve_model(DEFAULT_MODEL)


@pytest.fixture(scope="session")
def float32_path(model_path: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The default model as transformers reads it out of its GGUF file, in float32: a folder of safetensors."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from scheduler.models.files.checkpoint import gguf_file

    gguf = gguf_file(model_path)
    assert gguf is not None
    folder = str(tmp_path_factory.mktemp("float32"))
    model = AutoModelForCausalLM.from_pretrained(model_path, gguf_file=gguf.name, dtype="float32")
    vars(model)["hf_quantizer"] = None  # transformers takes the model for quantized still, and would not save it
    model.config.quantization_config = None
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory, model_path: str) -> Iterator[Server]:
    """The default model in float32, shared by all tests that leave it alive."""
    from tests.server.serving import Server

    with Server(tmp_path_factory.mktemp("server") / "log", "--dtype", "float32") as server:
        yield server
