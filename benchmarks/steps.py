"""Where a step's time goes, in the parts that Carousel wrote: attention, planning, and what is around the model.

python -m benchmarks.micro steps
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from prometheus_client import CollectorRegistry

from scheduler.attention import AttentionBackend, LayerSpec, PackedBatch
from scheduler.attention.native_backend import NativeAttention
from scheduler.config import EngineConfig
from scheduler.core.attention import TorchAttention
from scheduler.core.blocks import BlockPool
from scheduler.core.kv_cache import KVCache
from scheduler.core.model import StepOutput
from scheduler.core.request import Request
from scheduler.core.scheduler import Scheduler
from scheduler.core.step import NOTHING, ChunkResult, SampledToken
from scheduler.features.fair import FairShare
from scheduler.features.giving_way import GivingWay
from scheduler.features.prices import Prices
from scheduler.models.files.model_source import resolve_model
from scheduler.models.loading import usable_cpus
from scheduler.observing.metrics import EngineMetrics
from scheduler.process.engine_core import EngineCore
from scheduler.sampling_params import SamplingParams
from scheduler.wire.messages import EngineState, Phases, Received, StepStats

USERS, PROMPTS = (10, 1_000, 10_000), (100, 10_000, 100_000)

SPEC = LayerSpec(9, 3, 64, 64, 0.125, None, None)
NUM_LAYERS = 30


def milliseconds(call: Callable[[], object], repetitions: int) -> float:
    """The median time of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def attention(backend: AttentionBackend, num_sequences: int, context: int, repetitions: int) -> float:
    """Milliseconds of the default model's attention over all layers, one query a sequence, bfloat16."""
    blocks_each = -(-context // 16)
    num_blocks = num_sequences * blocks_each
    cache = KVCache(
        [SPEC] * NUM_LAYERS,
        backend,
        num_blocks=num_blocks,
        block_size=16,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    for keys, values, _ in cache.layers:
        keys.normal_()
        values.normal_()
    tables = torch.randperm(num_blocks).int().view(num_sequences, blocks_each)
    last = tables[:, (context - 1) // 16].long() * 16 + (context - 1) % 16
    batch = PackedBatch(
        input_ids=torch.zeros(num_sequences, dtype=torch.int64),
        positions=torch.full((num_sequences,), context - 1),
        slot_mapping=last.unsqueeze(0),
        query_start=torch.arange(num_sequences + 1, dtype=torch.int32),
        context_lens=torch.full((num_sequences,), context, dtype=torch.int32),
        block_tables=tables.unsqueeze(0),
        read_rows=torch.empty(0, dtype=torch.int64),
        sample_rows=torch.arange(num_sequences),
        query_lens=[1] * num_sequences,
        contexts=[context] * num_sequences,
    )
    query = torch.randn(num_sequences, 9, 64, dtype=torch.bfloat16)
    key, value = torch.randn(2, num_sequences, 3, 64, dtype=torch.bfloat16)

    def all_layers() -> None:
        for layer in cache.layers:
            backend.attend(query, key, value, layer, batch, SPEC)

    return milliseconds(all_layers, repetitions)


def planning(num_running: int, num_waiting: int) -> float:
    """Milliseconds of one schedule() and commit() under the default policy, with 20 users."""
    pool = BlockPool(200_000, 16)
    policy = FairShare(Prices())
    scheduler = Scheduler(
        pool,
        policy,
        yielding=GivingWay(policy),
        max_num_seqs=num_running,
        max_batched_tokens=16 * num_running,
        max_model_len=4096,
    )
    params = SamplingParams(max_tokens=4000, seed=0)
    for index in range(num_running + num_waiting):
        prompt = [index % 1000] * 16
        user = f"user{index % 20}"
        scheduler.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params, user=user))

    for _ in range(5):
        _step(scheduler)
    assert scheduler.num_running == num_running
    return milliseconds(lambda: _step(scheduler), 50)


def crowded_planning(num_users: int, num_prompt_tokens: int) -> float:
    """Milliseconds of one schedule() and commit() with 64 sequences running, of as many users, beside users who
    each wait with such a prompt: for a seat, or for the blocks that long prompts take."""
    num_running, max_len = 64, 2 * num_prompt_tokens + 4000
    scheduler = Scheduler(
        BlockPool(max_len // 16 + num_running, 16),
        FairShare(Prices()),
        max_num_seqs=num_running if num_prompt_tokens < 1000 else 2 * num_running,
        max_batched_tokens=16 * num_running,
        max_model_len=max_len,
    )
    params = SamplingParams(max_tokens=2000, seed=0)

    def add(name: str, prompt: list[int]) -> None:
        scheduler.add(Request(request_id=name, prompt_token_ids=prompt, params=params, user=name))

    for index in range(num_running):
        add(f"runs{index}", [index] * 16)
    if num_prompt_tokens >= 1000:  # holds the blocks
        add("long", [7] * num_prompt_tokens)
    while scheduler.num_waiting or any(not each.num_output_tokens for each in scheduler.running.values()):
        _step(scheduler)
    prompt = [8] * num_prompt_tokens
    for index in range(num_users):
        add(f"waits{index}", prompt)
    return milliseconds(lambda: _step(scheduler), 30)


def _step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    sampled = ChunkResult([SampledToken(7)])
    scheduler.commit(plan, [sampled if chunk.samples else NOTHING for chunk in plan.chunks])


def recording(num_sequences: int) -> float:
    """Milliseconds that the metrics of one decode step take, in the HTTP process."""
    metrics = EngineMetrics(CollectorRegistry(), "model")
    users = {f"user{number}": Received(10.0, 0.001) for number in range(8)}
    phases = Phases(0.0001, 0.014, 0.0003, 0.0001)
    step = StepStats(0.015, num_sequences, 0, 0, 0, num_sequences, 0, 0, 0, phases, users)
    state = EngineState(num_sequences, 0, 100, 10, 0.0)

    def record() -> None:
        metrics.record_state(state)
        metrics.record_step(step, 0.0001)
        for number in range(num_sequences):
            metrics.record_tokens(f"user{number % 8}", 1)
            metrics.record_next_token(0.015)

    return milliseconds(record, 200)


def step_parts(num_sequences: int) -> tuple[float, float, float]:
    """Milliseconds of a whole decode step of the default model, of the model's part in it, and of sampling."""
    undivided = 10_000.0  # milliseconds: whoever sits in the batch is in every step
    config = EngineConfig(max_num_seqs=num_sequences, max_model_len=512, longest_step_ms=undivided)
    core = EngineCore(config, resolve_model(config.model))
    params = SamplingParams(max_tokens=100, temperature=0, seed=0, ignore_eos=True)
    for index in range(num_sequences):
        prompt = [(index * 37 + place * 11) % 40_000 + 5 for place in range(128)]
        core.add(Request(request_id=str(index), prompt_token_ids=prompt, params=params))
    inside: list[float] = []
    forward = core.model.forward

    def timed(batch: PackedBatch) -> StepOutput:
        start = time.perf_counter()
        output = forward(batch)
        inside.append(time.perf_counter() - start)
        return output

    core.model.forward = timed  # type: ignore[method-assign]
    steps: list[float] = []
    models: list[float] = []
    samplings: list[float] = []
    while core.has_work:
        start = time.perf_counter()
        outputs = core.step()
        if (
            outputs.step is not None
            and outputs.step.num_tokens == outputs.step.num_sampled_tokens == num_sequences
        ):
            steps.append(time.perf_counter() - start)
            models.append(inside[-1])
            samplings.append(outputs.step.phases.sample)
    step, model, sampling = (1000 * statistics.median(times) for times in (steps, models, samplings))
    return step, model, sampling


def run() -> None:
    cpus = usable_cpus()
    torch.set_num_threads(cpus)
    native, plain = NativeAttention(cpus), TorchAttention()
    print(f"attention, {NUM_LAYERS} layers, bfloat16, {cpus} threads")
    print(f"  32 sequences of 512 tokens   native {attention(native, 32, 512, 20):8.1f} ms")
    print(f"                               torch  {attention(plain, 32, 512, 3):8.1f} ms")
    both, single = attention(native, 1, 8000, 20), attention(NativeAttention(1), 1, 8000, 20)
    print(f"  1 sequence of 8,000 tokens   native {both:8.1f} ms, {single:.1f} ms with one thread")
    print("planning one step (schedule and commit), fair shares between 20 users")
    print(f"  256 running, 100,000 waiting        {planning(256, 100_000):8.2f} ms")
    print("the same with 64 running, by how many more users wait, and with prompts of how many tokens")
    print(f"  {'users':>6}" + "".join(f"{size:>12,}" for size in PROMPTS))
    for users in USERS:
        row = "".join(f"{crowded_planning(users, size):9.2f} ms" for size in PROMPTS)
        print(f"  {users:6,}{row}", flush=True)
    print(f"recording the metrics of one step of 32 sequences of 8 users   {recording(32):8.3f} ms")
    print("one decode step of the default model, in the default mode")
    for count in (1, 8, 32, 256):
        step, model, sampling = step_parts(count)
        rest = step - model - sampling
        print(
            f"  {count:3} sequences   {step:7.1f} ms: sampling {sampling:.2f} ms, "
            f"around model and sampling {rest:.2f} ms ({rest / step:.1%})"
        )
