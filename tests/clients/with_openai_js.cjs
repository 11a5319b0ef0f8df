// The official client in JavaScript: chat, completions and responses, streamed and whole, a tool, and an error.
const OpenAI = require("openai").default;
const { CAROUSEL_URL, CAROUSEL_MODEL, CAROUSEL_TOOLS_URL, CAROUSEL_TOOLS_MODEL } = process.env;

function check(what, holds, seen) {
  if (!holds) {
    console.log(`failed: ${what}; saw ${JSON.stringify(seen)}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
}

async function main() {
  const client = new OpenAI({ baseURL: `${CAROUSEL_URL}/v1`, apiKey: "none", maxRetries: 0 });
  const ask = { model: CAROUSEL_MODEL, messages: [{ role: "user", content: "Name three rivers." }], temperature: 0 };
  const whole = await client.chat.completions.create({ ...ask, max_tokens: 12 });
  check("chat", whole.choices[0].message.content && whole.usage.completion_tokens === 12, whole);
  let text = "";
  for await (const chunk of await client.chat.completions.create({ ...ask, max_tokens: 12, stream: true })) {
    text += chunk.choices[0]?.delta?.content ?? "";
  }
  check("chat, streamed, is the same text", text === whole.choices[0].message.content, text);
  const done = await client.completions.create({ model: CAROUSEL_MODEL, prompt: "One two three", max_tokens: 4 });
  check("completions", done.choices[0].text, done);
  const response = await client.responses.create({ model: CAROUSEL_MODEL, input: "Name a river.", max_output_tokens: 12 });
  check("responses", response.output_text, response);

  const able = new OpenAI({ baseURL: `${CAROUSEL_TOOLS_URL}/v1`, apiKey: "none", maxRetries: 0 });
  const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
  const runner = able.chat.completions.runTools({
    model: CAROUSEL_TOOLS_MODEL,
    messages: [{ role: "user", content: "What is the weather in Paris?" }],
    temperature: 0,
    max_tokens: 60,
    parallel_tool_calls: false,
    tool_choice: { type: "function", function: { name: "get_weather" } },
    tools: [
      { type: "function", function: { name: "get_weather", parameters, parse: JSON.parse, function: () => "sunny" } },
    ],
  });
  const told = await runner.finalFunctionToolCallResult();
  check("runTools calls the tool", told === "sunny", told);
  const refused = await client.chat.completions.create({ ...ask, temperature: -1 }).catch((error) => error);
  check("a bad value is refused", refused.status === 400 && refused.param === "temperature", refused);
}

main().catch((error) => check("no exception", false, String(error)));
