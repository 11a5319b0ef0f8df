"""The official client: each endpoint, streamed and whole, tools, `parse`, and errors as its own exceptions."""

import json

from checks import ASK, MODEL, SAY, TOOLS_MODEL, TOOLS_URL, URL, WEATHER, check
from openai import BadRequestError, OpenAI
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


client = OpenAI(base_url=f"{URL}/v1", api_key="none", max_retries=0)
chat = client.chat.completions.create(model=MODEL, messages=SAY, max_completion_tokens=12, temperature=0)
check("chat", chat.choices[0].message.content and chat.usage.completion_tokens == 12, chat)
stream = client.chat.completions.create(
    model=MODEL,
    messages=SAY,
    max_completion_tokens=12,
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
chunks = list(stream)
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
check("chat, streamed, is the same text", text == chat.choices[0].message.content, text)
check("usage at the end", chunks[-1].usage.completion_tokens == 12, chunks[-1])
done = client.completions.create(model=MODEL, prompt="One two three", max_tokens=4, logprobs=2, echo=True)
check("completions with echo and logprobs", len(done.choices[0].logprobs.tokens) > 4, done)
response = client.responses.create(model=MODEL, input="Name a river.", max_output_tokens=12)
check("responses", response.output_text and response.usage.output_tokens > 0, response)
with client.responses.stream(
    model=MODEL, input="Name a river.", max_output_tokens=12, extra_body={"ignore_eos": True}
) as events:
    told = list(events)
kinds = [event.type for event in told]  # an answer cut by its limit ends as incomplete
text = "".join(event.delta for event in told if event.type == "response.output_text.delta")
check("responses, streamed", kinds[0] == "response.created" and kinds[-1] == "response.incomplete", kinds)
check("its text is the last event's", text and text == told[-1].response.output_text, told[-1])
parsed = client.chat.completions.parse(
    model=MODEL,
    messages=[{"role": "user", "content": "Ada is 36."}],
    response_format=Person,
    temperature=0,
    max_completion_tokens=60,
)
check("chat.completions.parse", isinstance(parsed.choices[0].message.parsed, Person), parsed)
parsed = client.responses.parse(
    model=MODEL, input="Ada is 36.", text_format=Person, temperature=0, max_output_tokens=60
)
check("responses.parse", isinstance(parsed.output_parsed, Person), parsed)

tools_client = OpenAI(base_url=f"{TOOLS_URL}/v1", api_key="none", max_retries=0)
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": WEATHER, "strict": True}}]
messages = [{"role": "user", "content": ASK}]
asked = tools_client.chat.completions.create(
    model=TOOLS_MODEL, messages=messages, tools=tools, tool_choice="required", temperature=0
).choices[0]
call = asked.message.tool_calls[0]
check(
    "a tool is called",
    asked.finish_reason == "tool_calls" and "city" in json.loads(call.function.arguments),
    asked,
)
messages += [asked.message, {"role": "tool", "tool_call_id": call.id, "content": "21 degrees and sunny"}]
told = tools_client.chat.completions.create(model=TOOLS_MODEL, messages=messages, tools=tools, max_tokens=30)
check("and its result answered", told.choices[0].message.content or told.choices[0].message.tool_calls, told)
with tools_client.chat.completions.stream(
    model=TOOLS_MODEL, messages=messages[:1], tools=tools, tool_choice="required", temperature=0
) as events:
    last = events.until_done().get_final_completion()
streamed = last.choices[0].message.tool_calls[0].function.arguments
check("a tool, streamed", json.loads(streamed) == json.loads(call.function.arguments), last)
flat = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": True}]
asked = tools_client.responses.create(model=TOOLS_MODEL, input=ASK, tools=flat, tool_choice="required")
check("a tool by responses", asked.output[-1].type == "function_call", asked)

embedded = client.embeddings.create(model=MODEL, input=["a", "b"])
check("embeddings", [len(each.embedding) for each in embedded.data] == [576, 576], embedded.usage)
try:
    client.chat.completions.create(model=MODEL, messages=SAY, temperature=-1)
    check("a bad value is refused", False)
except BadRequestError as error:
    check("a bad value is refused", error.param == "temperature", error)
check("models", client.models.list().data[0].id == MODEL and client.models.retrieve(MODEL).id == MODEL)
