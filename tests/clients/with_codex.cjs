// OpenAI's Codex CLI, which speaks the Responses API.
const fs = require("node:fs");
const path = require("node:path");
const { main } = require("./agents.cjs");

main({
  program: "codex",
  env: {},
  tell({ home, url, model }) {
    fs.mkdirSync(path.join(home, ".codex"), { recursive: true });
    fs.writeFileSync(
      path.join(home, ".codex", "config.toml"),
      `model = "${model}"\nmodel_provider = "carousel"\n[model_providers.carousel]\nname = "Carousel"\n` +
        `base_url = "${url}/v1"\nwire_api = "responses"\nstream_idle_timeout_ms = 600000\n`,
    );
    return { args: ["exec"], env: {} };
  },
  ask: (question) => ["--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", question],
  goOn: (question) => ["resume", "--last", "--skip-git-repo-check", question],
  steps: (folder) => [
    ["exec_command", { cmd: "ls", workdir: folder }],
    ["exec_command", { cmd: "cat notes.txt", workdir: folder }],
  ],
});
