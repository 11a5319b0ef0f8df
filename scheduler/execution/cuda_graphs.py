"""Decoding on a GPU as CUDA graphs: one launch a step, where the modules' hundreds would keep the GPU waiting."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from scheduler.attention import LayerSpec, PackedBatch
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepModel, StepOutput

logger = logging.getLogger(__name__)


class CudaGraphs:
    """What `model` is; a step in which every sequence decodes one token is replayed from a graph.

    There is one graph for each number of rows in `round_up`, captured when it is first wanted. A model that cannot
    be captured, because it waits for the GPU within a step, runs as it is, with a warning.
    """

    def __init__(
        self,
        model: StepModel,
        *,
        max_rows: int,
        num_groups: int,
        table_width: int,
        spare_block: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self.layers: list[LayerSpec] = model.layers
        self._model = model
        self._max_rows = max_rows
        self._input = DecodeInput(
            max_rows,
            num_groups=num_groups,
            table_width=table_width,
            spare_block=spare_block,
            block_size=block_size,
            device=device,
        )
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, StepOutput]] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
        self._can_capture = True

    def bind(self, cache: KVCache, max_len: int) -> None:
        self._model.bind(cache, max_len)

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> StepOutput:
        """One step, as the model computes it."""
        size = len(batch.query_lens)
        only_decodes = len(batch.sample_rows) == size == len(batch.input_ids) <= self._max_rows
        rows = min(round_up(size), self._max_rows)
        if only_decodes and self._can_capture and rows not in self._graphs:
            self._capture(rows)
        if not only_decodes or rows not in self._graphs:
            return self._model.forward(batch)
        graph, (logits, states) = self._graphs[rows]
        self._input.load(batch)
        graph.replay()
        return StepOutput(logits[:size].clone(), states)  # the next replay writes over them

    def _capture(self, rows: int) -> None:
        self._input.clear()
        batch = self._input.first(rows)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                self._model.forward(batch)  # compiles what is not yet compiled
                graph = torch.cuda.CUDAGraph()
                # Another object, or attention would use what it worked out for the first outside of the graph.
                with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                    output = self._model.forward(replace(batch))
        except RuntimeError as error:
            self._can_capture = False
            logger.warning("decoding runs without CUDA graphs, and is slower: %s", error)
        else:
            self._graphs[rows] = graph, output
        torch.cuda.current_stream().wait_stream(stream)


class DecodeInput:
    """A batch at fixed addresses, which each decoding step overwrites.

    Rows beyond the step's are padding: sequences of one token each, whose KV goes into `spare_block`, a block that
    is in no sequence's table.
    """

    def __init__(
        self,
        max_rows: int,
        *,
        num_groups: int,
        table_width: int,
        spare_block: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._spare_block = spare_block
        self._spare_slot = spare_block * block_size
        self._all = PackedBatch(
            input_ids=torch.empty(max_rows, dtype=torch.int64, device=device),
            positions=torch.empty(max_rows, dtype=torch.int64, device=device),
            slot_mapping=torch.empty(num_groups, max_rows, dtype=torch.int64, device=device),
            query_start=torch.arange(max_rows + 1, dtype=torch.int32, device=device),
            context_lens=torch.empty(max_rows, dtype=torch.int32, device=device),
            block_tables=torch.empty(num_groups, max_rows, table_width, dtype=torch.int32, device=device),
            sample_rows=torch.arange(max_rows, device=device),
            read_rows=torch.empty(0, dtype=torch.int64, device=device),
            query_lens=[1] * max_rows,
            contexts=[1] * max_rows,  # not the contexts: nothing that a graph replays may depend on them
        )
        self.clear()

    def clear(self) -> None:
        self._pad(0)

    def load(self, batch: PackedBatch) -> None:
        """Take over a step's rows; all others become padding."""
        _, size, width = batch.block_tables.shape
        self._all.input_ids[:size] = batch.input_ids
        self._all.positions[:size] = batch.positions
        self._all.slot_mapping[:, :size] = batch.slot_mapping
        self._all.context_lens[:size] = batch.context_lens
        self._all.block_tables[:, :size, :width] = batch.block_tables
        self._pad(size)

    def first(self, rows: int) -> PackedBatch:
        """The first rows, as a batch that shares their memory."""
        return PackedBatch(
            input_ids=self._all.input_ids[:rows],
            positions=self._all.positions[:rows],
            slot_mapping=self._all.slot_mapping[:, :rows],
            query_start=self._all.query_start[: rows + 1],
            context_lens=self._all.context_lens[:rows],
            block_tables=self._all.block_tables[:, :rows],
            sample_rows=self._all.sample_rows[:rows],
            read_rows=self._all.read_rows,
            query_lens=self._all.query_lens[:rows],
            contexts=self._all.contexts[:rows],
        )

    def _pad(self, size: int) -> None:
        self._all.input_ids[size:] = 0
        self._all.positions[size:] = 0
        self._all.slot_mapping[:, size:] = self._spare_slot
        self._all.context_lens[size:] = 1
        self._all.block_tables[:, size:] = self._spare_block


def round_up(size: int) -> int:
    """1, 2, 4, and multiples of 8: the numbers of rows that have a graph."""
    return 1 << (size - 1).bit_length() if size < 8 else -(-size // 8) * 8
