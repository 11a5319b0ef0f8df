"""What other servers call fields that are here too: their clients send them to every server that they talk to.

What is given by its own name wins over its synonyms.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

Json = dict[str, Any]

LENGTHS = (
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "max_new_tokens",  # text-generation-inference
    "n_predict",  # llama.cpp
    "num_predict",  # Ollama
)
"""Of the answer."""

SAMPLING = {
    "ebnf": "guided_grammar",  # SGLang
    "grammar": "guided_grammar",  # llama.cpp
    "json_schema": "guided_json",  # llama.cpp, SGLang
    "random_seed": "seed",  # Mistral
    "regex": "guided_regex",  # SGLang
    "rep_pen": "repetition_penalty",  # KoboldCpp
    "repeat_penalty": "repetition_penalty",  # llama.cpp, Ollama
    "stop_sequences": "stop",  # Anthropic
    "typ_p": "typical_p",  # llama.cpp
    "typical": "typical_p",  # KoboldCpp
}
"""How tokens are chosen, and when they end."""

OPTIONS = (
    "frequency_penalty",
    "min_p",
    "mirostat",
    "num_predict",
    "presence_penalty",
    "repeat_penalty",
    "seed",
    "stop",
    "temperature",
    "tfs_z",
    "top_k",
    "top_p",
    "typical_p",
)
"""What Ollama's `options` hold of both. The others are about how its server runs the model."""

THINKING = {
    "enable_thinking": "chat_template_kwargs.enable_thinking",  # Qwen
    "reasoning": "reasoning_effort, include_reasoning",  # OpenRouter
    "think": "chat_template_kwargs.enable_thinking, or reasoning_effort",  # Ollama
    "thinking": "chat_template_kwargs.enable_thinking",  # DeepSeek
}
"""Whether a model thinks before it answers, and how long."""

_SWITCHES = {"enabled": True, "disabled": False}


def sampling_synonyms(length: str) -> dict[str, str]:
    """What each means, in a request whose longest answer is called `length`."""
    ours = SAMPLING | dict.fromkeys(LENGTHS, length)
    return (
        ours | {"options": "what it has of these"} | {f"options.{name}": ours.get(name, name) for name in OPTIONS}
    )


def sampling_in_our_words(values: Json, own: Collection[str], length: str) -> Json:
    """`own`: fields of the request, which are no synonyms in it."""
    options = values.pop("options", None)
    if isinstance(options, dict):
        for name, value in options.items():
            if value is not None:
                values.setdefault(name if name in OPTIONS else f"options.{name}", value)
    elif options is not None:
        values["options"] = options  # it is left out
    for name, ours in SAMPLING.items():
        if name in values and name not in own:
            values.setdefault(ours, values.pop(name))
    lengths = [values.pop(name) for name in LENGTHS if name in values and name not in own]
    if lengths and not any(name in values for name in LENGTHS):
        values[length] = lengths[0]
    return values


def thinking_in_our_words(values: Json, own: Collection[str]) -> Json:
    """`reasoning_effort`, `include_reasoning` and variables of the template."""
    switch: bool | None = None
    for name in THINKING:
        if name not in values or name in own:
            continue
        value = values.pop(name)
        if isinstance(value, dict):
            if (effort := value.get("effort")) is not None:
                values.setdefault("reasoning_effort", effort)
            if isinstance(exclude := value.get("exclude"), bool):
                values.setdefault("include_reasoning", not exclude)
            value = value.get("enabled", _SWITCHES.get(str(value.get("type"))))
        if isinstance(value, bool):
            switch = value
        elif isinstance(value, str):
            values.setdefault("reasoning_effort", value)
        elif value is not None:
            values[name] = value  # it is left out
    variables = values.get("chat_template_kwargs", {})
    if switch is not None and isinstance(variables, dict):
        values["chat_template_kwargs"] = {"enable_thinking": switch, "thinking": switch} | variables
    return values
