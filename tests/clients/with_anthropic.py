"""Anthropic's client: messages, streamed and whole, tools and their results, and counting."""

from anthropic import Anthropic, BadRequestError
from checks import ASK, MODEL, SAY, TOOLS_MODEL, TOOLS_URL, URL, WEATHER, check

GREEDY = {"temperature": 0}  # the client has no argument for it any more
client = Anthropic(base_url=URL, api_key="none", max_retries=0)
whole = client.messages.create(model=MODEL, max_tokens=12, messages=SAY, system="Be brief.", extra_body=GREEDY)
check("messages", whole.content[0].text and whole.usage.output_tokens == 12, whole)
with client.messages.stream(
    model=MODEL,
    max_tokens=12,
    messages=SAY,
    extra_body=GREEDY,
    system=[{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
) as stream:
    text = "".join(stream.text_stream)
check("messages, streamed, is the same text", text == whole.content[0].text, text)
counted = client.messages.count_tokens(model=MODEL, messages=SAY, system="Be brief.")
check("count_tokens", counted.input_tokens == whole.usage.input_tokens, counted)

client = Anthropic(base_url=TOOLS_URL, api_key="none", max_retries=0)
tools = [{"name": "get_weather", "description": "The weather now", "input_schema": WEATHER}]
turns = [{"role": "user", "content": ASK}]
asked = client.messages.create(
    model=TOOLS_MODEL,
    max_tokens=100,
    messages=turns,
    tools=tools,
    tool_choice={"type": "any", "disable_parallel_tool_use": True},
    extra_body=GREEDY,
)
use = asked.content[-1]
check("a tool is used", asked.stop_reason == "tool_use" and "city" in use.input, asked)
result = {"type": "tool_result", "tool_use_id": use.id, "content": "21 degrees and sunny"}
turns += [{"role": "assistant", "content": asked.content}, {"role": "user", "content": [result]}]
told = client.messages.create(model=TOOLS_MODEL, max_tokens=30, messages=turns, tools=tools)
check("and its result answered", told.content, told)
try:
    client.messages.create(model=MODEL, max_tokens=12, messages=[])
    check("an empty list is refused", False)
except BadRequestError as error:
    check("an empty list is refused", error.body["error"]["type"] == "invalid_request_error", error)
