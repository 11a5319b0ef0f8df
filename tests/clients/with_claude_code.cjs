// Anthropic's Claude Code, which speaks the Messages API.
const { main } = require("./agents.cjs");

main({
  program: "claude",
  env: { DISABLE_AUTOUPDATER: "1", API_TIMEOUT_MS: "600000" },
  tell: ({ url }) => ({ args: [], env: { ANTHROPIC_BASE_URL: url, ANTHROPIC_AUTH_TOKEN: "none" } }),
  ask: (question) => ["-p", question, "--allowedTools", "Bash,Read"],
  goOn: (question) => ["-c", "-p", question, "--allowedTools", "Bash,Read"],
  steps: (folder, file) => [
    ["Bash", { command: "ls", description: "List the folder" }],
    ["Read", { file_path: file }],
  ],
});
