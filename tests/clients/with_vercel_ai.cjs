// Vercel's AI SDK: text, streamed and whole, a tool and its answer, objects of a schema, and an error.
const { Output, generateText, stepCountIs, streamText, tool } = require("ai");
const { createOpenAICompatible } = require("@ai-sdk/openai-compatible");
const { z } = require("zod");
const { CAROUSEL_URL, CAROUSEL_MODEL, CAROUSEL_TOOLS_URL, CAROUSEL_TOOLS_MODEL } = process.env;

function check(what, holds, seen) {
  if (!holds) {
    console.log(`failed: ${what}; saw ${JSON.stringify(seen)}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
}

function provider(url) {
  return createOpenAICompatible({
    name: "carousel",
    baseURL: `${url}/v1`,
    apiKey: "none",
    includeUsage: true,
    supportsStructuredOutputs: true,
  });
}

async function main() {
  const ask = {
    model: provider(CAROUSEL_URL)(CAROUSEL_MODEL),
    prompt: "Name three rivers.",
    temperature: 0,
    maxOutputTokens: 12,
    maxRetries: 0,
  };
  const whole = await generateText(ask);
  check("generateText", whole.text && whole.usage.outputTokens === 12 && whole.finishReason === "length", whole);
  const stream = streamText(ask);
  let text = "";
  for await (const delta of stream.textStream) text += delta;
  const usage = await stream.usage;
  check("streamText is the same text", text === whole.text && usage.outputTokens === 12, [text, usage]);

  const able = { model: provider(CAROUSEL_TOOLS_URL)(CAROUSEL_TOOLS_MODEL), temperature: 0, maxRetries: 0 };
  const asked = [];
  const tools = {
    get_weather: tool({
      description: "The weather in a city",
      inputSchema: z.object({ city: z.string() }),
      execute: async ({ city }) => {
        asked.push(city);
        return "sunny";
      },
    }),
  };
  const weather = {
    ...able,
    prompt: "What is the weather in Paris?",
    maxOutputTokens: 60,
    providerOptions: { carousel: { parallel_tool_calls: false } },
    tools,
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "none" : "required" }),
    stopWhen: stepCountIs(2),
  };
  const told = await generateText(weather);
  check("generateText calls the tool and goes on", asked.length === 1 && told.steps.length === 2 && told.text, told);
  const steps = await streamText(weather).steps;
  check("streamText calls the same tool", asked.length === 2 && asked[0] === asked[1] && steps[1].text, asked);

  const person = { ...able, prompt: "Ada is 36.", maxOutputTokens: 120 };
  const schema = z.object({ name: z.string(), age: z.number().int() });
  const { output } = await generateText({ ...person, output: Output.object({ schema }) });
  check("Output.object", schema.safeParse(output).success, output);
  const partial = streamText({ ...person, output: Output.object({ schema }) });
  let last;
  for await (const part of partial.partialOutputStream) last = part;
  check("Output.object, streamed, is the same", JSON.stringify(last) === JSON.stringify(output), last);
  const { output: sort } = await generateText({ ...person, output: Output.choice({ options: ["person", "city"] }) });
  check("Output.choice", ["person", "city"].includes(sort), sort);

  const refused = await generateText({ ...ask, temperature: -1 }).catch((error) => error);
  check("a bad value is refused", refused.statusCode === 400 && /temperature/.test(refused.message), refused);
}

main().catch((error) => check("no exception", false, String(error)));
