"""The knobs of `carousel serve`: every knob of the engine, and those of the HTTP side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from scheduler.config import EngineConfig, PositiveInt
from scheduler.sampling_params import MAX_LOGPROBS

MIN_BODY_BYTES = 1024 * 1024
MAX_BODY_BYTES = 16 * 1024 * 1024
"""Between these, the largest request body follows from the longest prompt that the model can read."""

PositiveSeconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def ledger_of(users: Path) -> Path:
    """Where the ledger is if nobody says otherwise: next to the users file."""
    return users.with_name(f"{users.stem}.ledger.sqlite3")


class ServeConfig(EngineConfig):
    """The knobs of one server. Filled like `EngineConfig`, from the same flags, environment and file."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every interface."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""

    tls_certificate: Path | None = None
    """PEM file of the server's certificate and those that vouch for it, to serve HTTPS; with --tls-key. Both are
    read again when they change."""

    tls_key: Path | None = None
    """PEM file of the certificate's key."""

    served_model_name: str | None = None
    """Name of the model in the API, or several with commas between them; by default the value of --model."""

    model_alias: str | None = None
    """More names of the model, with commas between them: agents ask for those of their vendor."""

    unknown_models: Literal["serve", "refuse"] = "serve"
    """What becomes of a request for a model of another name: this one answers, and says so in the answer's model
    and in the log; or it is refused with status 404. In a batch it is always refused."""

    root_path: Annotated[str, Field(pattern="^(/[^/?#]+)*$")] = ""
    """Where a proxy has this server, like /carousel. Requests are answered with it and without it."""

    cors_origins: str | None = None
    """Origins whose pages may call this server from a browser, with commas between them, or *. By default none."""

    unknown_fields: Literal["ignore", "refuse"] = "ignore"
    """What becomes of a request with a field that is not known: the field is left out and named in the header
    X-Carousel-Ignored, and once in the log; or the request is refused."""

    max_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] = 20
    """Logprobs of alternatives that a request can have of each token."""

    chat_template: Path | None = None
    """File of a chat template, in Jinja, in place of the model's own."""

    tool_call_parser: Literal["hermes", "llama3_json", "mistral", "mistral_args", "pythonic", "json"] | None = None
    """How the model writes calls of tools; by default what its chat template says, where that is plain."""

    reasoning_parser: Literal["think", "deepseek_r1", "qwen3", "mistral", "seed_oss"] | None = None
    """How the model marks what it thinks before it answers; by default what its chat template says."""

    trust_request_chat_template: bool = False
    """Run chat templates that requests bring with them. They are programs, in a sandbox that bounds what they can
    reach, but not how long they take."""

    allow_special_tokens_in_text: bool = False
    """Let messages spell out special tokens: a user can then end their own turn, and speak as the system."""

    users: Path | None = None
    """YAML file of the users and the hashes of their keys; `carousel users` makes and edits it. Changes to it are
    read while the server runs. By default nobody needs a key."""

    ledger: Path | None = None
    """SQLite file that keeps who used how much on which day; by default, with --users, it is next to that file
    (users.yaml: users.ledger.sqlite3)."""

    store: Path | None = None
    """SQLite file that keeps responses (/v1/responses), so that others can follow them by their ids: 10,000 of
    them and 1 GiB, for 30 days. Where there is no room, those of who has most go. By default none are kept."""

    batches: Path | None = None
    """Folder that keeps files and batches (/v1/files, /v1/batches), for 30 days. A batch gets what others leave,
    and goes on after a restart. By default there are none."""

    allowed_hosts: str | None = None
    """Names, with commas between them, that requests may have in their Host header besides this machine's own. By
    default that is looked at only on 127.0.0.1 without --users, where a page in a browser could otherwise reach
    the server under a name of its own; with this, on every address."""

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Serve /metrics on a port of its own, and there only; 0 takes a free one. There users have their names; by
    default /metrics is on the port of everything else, needs no key, and users are numbers in it."""

    metrics_host: str = "127.0.0.1"
    """Address of --metrics-port."""

    max_queued_requests: PositiveInt = 1024
    """Prompts that may wait for their first token, over all users; when they are so many, whoever holds more than
    their part of them is refused with status 429."""

    max_queued_tokens: PositiveInt = 1_000_000
    """Tokens that the waiting prompts may have together, and those of one request at most; when they are so many,
    whoever holds more than their part of them is refused with status 429."""

    max_connections: PositiveInt = 8192
    """Open connections, or as many as the system lets the server have. Where no more fit, a new one takes the
    place of the one on which nothing was asked for longest; where something is asked on all, its request is
    refused with status 503."""

    slow_body_seconds: PositiveSeconds = 30.0
    """Seconds that a request's body may take to arrive, and each mebibyte of a file; then the request ends with
    status 408, and its connection is closed."""

    stalled_stream_seconds: PositiveSeconds = 30.0
    """Seconds that the reader of an answer may take nothing; then the request and its connection end."""

    drain_timeout: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 30.0
    """Seconds that running requests may still take after Ctrl-C or SIGTERM; new ones are refused with status 503
    meanwhile. A second Ctrl-C ends the server at once."""

    otlp_endpoint: str | None = None
    """Send a span for each generation there, by OpenTelemetry's protocol over HTTP (http://127.0.0.1:4318/v1/traces);
    needs the extra `otel`."""

    access_log: bool = True
    """Log one line for each request."""

    log_prompts: bool = False
    """Put what clients ask into the access log. Without it, nothing that was said is ever logged."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to log."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key belong together: HTTPS needs both")
        return self

    @property
    def ledger_file(self) -> Path | None:
        if self.ledger is None and self.users is not None:
            return ledger_of(self.users)
        return self.ledger

    @property
    def model_name(self) -> str:
        """What clients put into `model`."""
        return self.model_names[0]

    @property
    def model_names(self) -> list[str]:
        """All of its names."""
        served = _names(self.served_model_name) or _names(self.model) or [self.model]
        return [*served, *_names(self.model_alias)]


def _names(listed: str | None) -> list[str]:
    """Those between the commas."""
    return [name for each in (listed or "").split(",") if (name := each.strip())]
