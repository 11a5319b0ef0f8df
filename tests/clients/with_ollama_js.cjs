// Ollama's own client in JavaScript: chat, streamed and whole, generate, embeddings, and an error.
const { Ollama } = require("ollama");
const { CAROUSEL_URL, CAROUSEL_MODEL } = process.env;

function check(what, holds, seen) {
  if (!holds) {
    console.log(`failed: ${what}; saw ${JSON.stringify(seen)}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
}

async function main() {
  const client = new Ollama({ host: CAROUSEL_URL });
  const listed = await client.list();
  check("list", listed.models.some((each) => each.model === CAROUSEL_MODEL), listed);
  const messages = [{ role: "user", content: "Name three rivers." }];
  const ask = { model: CAROUSEL_MODEL, messages, options: { temperature: 0, num_predict: 12 } };
  const whole = await client.chat(ask);
  check("chat", whole.message.content && whole.eval_count === 12, whole);
  let text = "";
  for await (const piece of await client.chat({ ...ask, stream: true })) text += piece.message.content;
  check("chat, streamed, is the same text", text === whole.message.content, text);
  const { options } = ask;
  const answer = await client.generate({ model: CAROUSEL_MODEL, prompt: "Name a river.", options });
  check("generate", answer.response, answer);
  const { embeddings } = await client.embed({ model: CAROUSEL_MODEL, input: "a river" });
  check("embed", embeddings.length === 1 && embeddings[0].length > 100);
  const refused = await client.chat({ ...ask, options: { temperature: -1 } }).catch((error) => error);
  check("a bad value is refused", String(refused.message).includes("temperature"), String(refused));
}

main().catch((error) => check("no exception", false, String(error)));
