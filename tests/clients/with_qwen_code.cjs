// Qwen Code, which speaks the Chat Completions API. It needs a newer Node.js than there may be: npm brings one.
const path = require("node:path");
const { main } = require("./agents.cjs");

main({
  program: "node",
  env: {},
  tell: ({ url, model }) => ({
    args: [path.join(process.env.NODE_PATH, ".bin", "qwen"), "--auth-type", "openai"],
    env: { OPENAI_BASE_URL: `${url}/v1`, OPENAI_API_KEY: "none", OPENAI_MODEL: model },
  }),
  ask: (question) => ["-p", question],
  goOn: (question) => ["--continue", "-p", question],
  steps: (folder, file) => [
    ["glob", { pattern: "*", path: folder }],
    ["read_file", { file_path: file }],
  ],
});
