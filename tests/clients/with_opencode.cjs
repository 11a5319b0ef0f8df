// opencode, which speaks the Chat Completions API through Vercel's AI SDK.
const fs = require("node:fs");
const path = require("node:path");
const { main } = require("./agents.cjs");

main({
  program: "opencode",
  env: { OPENCODE_DISABLE_AUTOUPDATE: "1" },
  tell({ home, url, model }) {
    const folder = path.join(home, ".config", "opencode");
    fs.mkdirSync(folder, { recursive: true });
    const provider = { npm: "@ai-sdk/openai-compatible", name: "Carousel", options: { baseURL: `${url}/v1` }, models: { [model]: {} } };
    fs.writeFileSync(path.join(folder, "opencode.json"), JSON.stringify({ provider: { carousel: provider }, model: `carousel/${model}` }));
    return { args: ["run"], env: {} };
  },
  ask: (question) => [question],
  goOn: (question) => ["--continue", question],
  steps: (folder, file) => [
    ["bash", { command: "ls", description: "List the folder" }],
    ["read", { filePath: file }],
  ],
});
