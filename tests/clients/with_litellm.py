"""LiteLLM by each of the providers that it may take Carousel for."""

import os

from checks import ASK, MODEL, SAY, TOOLS_MODEL, TOOLS_URL, URL, WEATHER, check

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the internet for prices
import litellm

tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}}]
for provider, path in (("openai", "/v1"), ("hosted_vllm", "/v1"), ("anthropic", "")):
    place = {"model": f"{provider}/{MODEL}", "api_base": URL + path, "api_key": "none", "max_tokens": 12}
    whole = litellm.completion(messages=SAY, temperature=0, **place).choices[0].message.content
    check(f"{provider}: completion", whole, whole)
    stream = litellm.completion(messages=SAY, temperature=0, stream=True, **place)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    check(f"{provider}: streamed, the same text", text == whole, text)
    place |= {"model": f"{provider}/{TOOLS_MODEL}", "api_base": TOOLS_URL + path, "max_tokens": 80}
    asked = litellm.completion(
        messages=[{"role": "user", "content": ASK}], tools=tools, tool_choice="required", temperature=0, **place
    )
    check(f"{provider}: a tool", asked.choices[0].message.tool_calls, asked)
