"""Every knob of the engine, in one validated place."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ByteSize, ConfigDict, Field, model_validator

DEFAULT_MODEL = "SmolLM2-135M-Instruct"

PositiveInt = Annotated[int, Field(ge=1)]


class EngineConfig(BaseModel):
    """The knobs of one engine. Raises `pydantic.ValidationError` with a sentence for each wrong value."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())

    model: str = DEFAULT_MODEL
    """What to serve: a local folder, a .gguf file, a Hugging Face id, or a name: SmolLM2-135M-Instruct or
    Qwen2.5-Coder-0.5B-Instruct, which are fetched at their first use."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type that the model computes in; auto is bfloat16 on CUDA or on a CPU with bfloat16 instructions, else
    float32. On a CPU a type given here is also that of the matrix products, unless --quantization says
    otherwise."""

    generation_config: Literal["auto", "none"] = "auto"
    """auto takes the model's own defaults for temperature, top_k, top_p, min_p and repetition_penalty, where it
    has a generation_config.json and a request does not say otherwise."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto is cuda if there is one."""

    max_num_seqs: PositiveInt = 64
    """Seats of the carousel: how many sequences at most share one step."""

    max_batched_tokens: PositiveInt | None = None
    """Tokens at most computed in one step, over all sequences; a longer prompt is computed in chunks. Fewer keep
    the streams smoother while prompts arrive; by default 2 a seat, and at least 128 on a CPU, 2048 on CUDA or
    with --target-itl-ms."""

    max_model_len: PositiveInt | None = None
    """Longest prompt plus answer, in tokens; by default what the model and the KV pool allow."""

    block_size: PositiveInt = 16
    """Tokens in one block of the KV pool."""

    kv_cache_memory: ByteSize | None = None
    """Memory for the KV pool (2GiB, 800MB); by default 40 % of the free memory (CUDA: 85 %), and never more
    than all seats could fill. A pool that holds fewer than 256 tokens (or --max-model-len, where that is given or
    the model's is shorter) is refused."""

    kv_cache_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Type of the keys and values in the KV pool; auto is bfloat16 on a CPU, float32 beside products in float32,
    and the model's own type on CUDA."""

    prefix_caching: bool = True
    """Reuse the KV blocks of a prefix that was computed before."""

    share_prefixes: bool = False
    """Let users reuse each other's prefixes too. Without it users find only their own, and cannot tell from the
    number of cached tokens, or from the time that an answer takes, what somebody else has asked."""

    attention_backend: Literal["auto", "native", "flex", "torch"] = "auto"
    """How attention reads the block pool: native is the C++ kernel for CPU, flex torch's FlexAttention for CUDA,
    torch the plain reference; auto is native on a CPU where it can be built, and flex on CUDA."""

    speculative: Literal["auto", "off", "ngram"] = "auto"
    """Guess the next tokens from what the prompt and the answer have said before, and compute several in one step
    where that is faster: no bit of an answer changes. auto is ngram where the native decoder runs, and off
    elsewhere."""

    context_shift: bool = False
    """Let an answer go on when it reaches the model's window: the first tokens stay, and the oldest behind them
    are dropped, a block at a time. For rotary models on the native decoder; a request can say it of itself, with
    "context_shift"."""

    cuda_graphs: bool = True
    """On CUDA with flex attention, replay steps that only decode as CUDA graphs: far less work for the CPU."""

    fused: bool = True
    """On a CPU, run the Llama-like families through the native decoder instead of transformers' modules. With it a
    request's tokens and logprobs have the same bits whoever else is in the batch; without it they may not."""

    quantization: Literal["auto", "none", "int8", "int4", "stored"] = "auto"
    """Arithmetic of the matrix products on a CPU: none is the type that --dtype names; int8 and int4 round the
    weights in groups of 64 and 32; stored takes a GGUF file's weights as they are. auto is stored for a GGUF file,
    and otherwise the first of int4 and int8 that raises perplexity by less than 1 %, unless --dtype is given."""

    policy: Literal["fair", "priority", "fcfs"] = "fair"
    """Who is admitted next and who gives way: fair shares the machine between users by their weights, priority
    goes by class and then arrival, fcfs by arrival alone."""

    output_token_price: Annotated[float, Field(gt=0)] = 2.0
    """What an output token counts in a user's service, in prompt tokens (policy fair)."""

    cached_token_price: Annotated[float, Field(ge=0)] = 0.05
    """What a prompt token counts that the prefix cache spared (policy fair)."""

    target_itl_ms: Annotated[float, Field(gt=0)] | None = None
    """Promise to running streams: chunks of prompts are cut so that a step, as far as the engine has learned what
    steps cost, stays under this many milliseconds."""

    longest_step_ms: Annotated[float, Field(gt=0)] = 40.0
    """Where a step of everybody would take longer than about this many milliseconds, running sequences decode in
    turns and prompts are computed in smaller chunks beside them: whoever arrives waits less for the next step. A
    target ITL goes before it."""

    step_timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds after which a step is taken to hang: the engine is started anew, and its requests go on. By default
    100 times what a step should take by what is known of its cost, and 30 at least; 900 at least on a GPU, which
    compiles."""

    trace: Path | None = None
    """Write every step to this file as Chrome trace events, to be opened in Perfetto."""

    log_format: Literal["text", "json"] = "text"
    """How log lines look; json has one object a line, with the request's id, user and figures as fields."""

    threads: PositiveInt | None = None
    """Threads of the forward pass; by default one for each core this process may use, within a container's quota,
    and fewer while other programs keep cores busy."""

    def step_tokens(self, device_type: str) -> int:
        """Tokens in a step. A CPU is busy with few: more would only make everybody's next token wait for prompts.
        With a latency target, steps are as long as the target allows."""
        if self.max_batched_tokens is not None:
            return self.max_batched_tokens
        few = device_type == "cpu" and self.target_itl_ms is None
        return max(128 if few else 2048, 2 * self.max_num_seqs)

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ValueError("max_model_len must be at least 2: one token of prompt and one of answer")
        return self
