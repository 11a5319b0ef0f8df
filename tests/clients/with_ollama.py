"""Ollama's own client in Python: chat and generate, streamed and whole, a form, a tool, embeddings, an error."""

import json

from checks import ASK, MODEL, SAY, TOOLS_MODEL, TOOLS_URL, URL, WEATHER, check
from ollama import Client, ResponseError

client = Client(URL)
options = {"num_predict": 12, "temperature": 0}
check("list", MODEL in [each.model for each in client.list().models], client.list())
check("show", client.show(MODEL).template, client.show(MODEL))
whole = client.chat(MODEL, SAY, options=options)
check("chat", whole.message.content and whole.eval_count == 12 and whole.done_reason == "length", whole)
pieces = list(client.chat(MODEL, SAY, options=options, stream=True))
said = "".join(piece.message.content for piece in pieces)
check("chat, streamed, is the same text", said == whole.message.content, said)
check("the last line has the counts", pieces[-1].done and pieces[-1].eval_count == 12, pieces[-1])
answer = client.generate(MODEL, "Name a river.", options=options)
check("generate", answer.response, answer)
plain = client.generate(MODEL, "One two three", raw=True, options=options, stream=True)
check("generate, raw and streamed", "".join(piece.response for piece in plain))
form = {"type": "object", "properties": {"river": {"type": "string"}}, "required": ["river"]}
held = client.chat(MODEL, SAY, format=form, options={"num_predict": 60, "temperature": 0})
check("an answer held to a schema", "river" in json.loads(held.message.content), held)
vectors = client.embed(MODEL, ["a river", "a sea"]).embeddings
check("embed", len(vectors) == 2 and len(vectors[0]) == len(vectors[1]) > 100)
check("a model is loaded by asking nothing", client.generate(MODEL).done_reason == "load")

tools = [{"type": "function", "function": {"name": "get_weather", "description": "", "parameters": WEATHER}}]
asked = [{"role": "user", "content": ASK}]
called = Client(TOOLS_URL).chat(TOOLS_MODEL, asked, tools=tools, options={"temperature": 0, "num_predict": 60})
(call,) = called.message.tool_calls or [None]
check("a tool is called", call and call.function.name == "get_weather" and call.function.arguments["city"], called)
try:
    client.chat(MODEL, SAY, options={"temperature": -1})
    check("a bad value is refused", False)
except ResponseError as error:
    check("a bad value is refused", error.status_code == 400 and "temperature" in error.error, error)
