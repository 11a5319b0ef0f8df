// What the coding agents' scripts share: a folder of their own, a proxy that sees what is said, the two tasks.
const { spawn } = require("node:child_process");
const fs = require("node:fs");
const http = require("node:http");
const os = require("node:os");
const path = require("node:path");
const { CAROUSEL_URL, CAROUSEL_TOOLS_MODEL, CAROUSEL_PYTHON, NODE_PATH } = process.env;

const TURN_SECONDS = 240; // of a turn with the real model: a first prompt of some 10,000 tokens is computed in it
const NOTE = "The gate opens at seven.";

function check(what, holds, seen) {
  if (!holds) {
    console.log(`failed: ${what}; saw ${JSON.stringify(seen)?.slice(0, 2000)}`);
    process.exit(1);
  }
  console.log(`ok: ${what}`);
}

// Passes everything on to `target`, and keeps each exchange.
async function proxy(target) {
  const exchanges = [];
  const server = http.createServer(async (request, response) => {
    const parts = [];
    for await (const part of request) parts.push(part);
    const body = Buffer.concat(parts);
    const exchange = { method: request.method, path: request.url, sent: asJson(body), status: 0, said: "", started: Date.now() };
    exchanges.push(exchange);
    const onward = http.request(`${target}${request.url}`, { method: request.method, headers: { ...request.headers, host: new URL(target).host } }, (answer) => {
      exchange.status = answer.statusCode;
      response.writeHead(answer.statusCode, answer.headers);
      answer.on("data", (part) => {
        exchange.first ??= Date.now();
        exchange.said += part;
        response.write(part);
      });
      answer.on("end", () => {
        exchange.ended = Date.now();
        response.end();
      });
    });
    onward.on("error", () => response.destroy());
    response.on("close", () => onward.destroy());
    onward.end(body);
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  return { url: `http://127.0.0.1:${server.address().port}`, exchanges, close: () => server.close() };
}

function asJson(body) {
  try {
    return JSON.parse(body);
  } catch {
    return null;
  }
}

// The events of a stream, or the one answer.
function events(exchange) {
  const whole = asJson(exchange.said);
  if (whole) return [whole];
  return exchange.said
    .split("\n")
    .filter((line) => line.startsWith("data: {"))
    .map((line) => asJson(line.slice(6)))
    .filter(Boolean);
}

// Tokens of the prompt, and those of them that the prefix cache spared, as each of the three APIs tells it.
function usage(exchange) {
  let found = { prompt: 0, cached: 0 };
  for (const event of events(exchange)) {
    const said = event.usage ?? event.response?.usage ?? event.message?.usage;
    if (!said) continue;
    const cached = said.prompt_tokens_details?.cached_tokens ?? said.input_tokens_details?.cached_tokens ?? said.cache_read_input_tokens ?? 0;
    const prompt = said.prompt_tokens ?? (said.input_tokens ?? 0) + (said.input_tokens_details ? 0 : cached);
    found = { prompt: Math.max(prompt, found.prompt), cached: Math.max(cached, found.cached) };
  }
  return found;
}

// What a prompt is made of, in the order of the model's template: the system's text, tools, and turns.
function parts(sent) {
  const turns = sent.messages ?? sent.input ?? [];
  const isSystem = (turn) => turn.role === "system" || turn.role === "developer";
  const system = [sent.system, sent.instructions, ...turns.filter(isSystem).map((turn) => turn.content)];
  return JSON.stringify(system) + JSON.stringify(sent.tools) + JSON.stringify(turns.filter((turn) => !isSystem(turn)));
}

// The part of a prompt's beginning, by characters, that another one begins with too.
function shared(sent, other) {
  const [one, two] = [parts(sent), parts(other)];
  let length = 0;
  while (length < one.length && one[length] === two[length]) length++;
  return length / one.length;
}

// The calls of an answer: name and arguments, as each of the three APIs tells them.
function calls(exchange) {
  const found = {};
  for (const event of events(exchange)) {
    for (const call of event.choices?.[0]?.delta?.tool_calls ?? []) {
      found[call.index] ??= { name: "", text: "" };
      found[call.index].name += call.function?.name ?? "";
      found[call.index].text += call.function?.arguments ?? "";
    }
    if (event.type === "response.output_item.done" && event.item.type === "function_call")
      found[event.output_index] = { name: event.item.name, text: event.item.arguments };
    if (event.type === "content_block_start" && event.content_block.type === "tool_use")
      found[event.index] = { name: event.content_block.name, text: "" };
    if (event.delta?.type === "input_json_delta") found[event.index].text += event.delta.partial_json;
  }
  return Object.values(found);
}

const isCut = (exchange) => /"(max_tokens|length|max_output_tokens|model_context_window_exceeded)"/.test(exchange.said);

// One run of a program, to its end or its time.
function run(command, args, { cwd, env, seconds }) {
  return new Promise((done) => {
    const child = spawn(command, args, { cwd, env, stdio: ["ignore", "pipe", "pipe"], detached: true });
    let output = "";
    child.stdout.on("data", (part) => (output += part));
    child.stderr.on("data", (part) => (output += part));
    const timer = setTimeout(() => process.kill(-child.pid, "SIGKILL"), 1000 * seconds);
    child.on("close", (code) => {
      clearTimeout(timer);
      done({ code, output });
    });
  });
}

async function scripted(folder, steps) {
  const file = path.join(folder, "steps.json");
  fs.writeFileSync(file, JSON.stringify(steps));
  const child = spawn(CAROUSEL_PYTHON, ["-m", "tests.clients.scripted_server", CAROUSEL_TOOLS_MODEL, file], { stdio: ["ignore", "pipe", "inherit"] });
  const line = await new Promise((done) => child.stdout.once("data", (part) => done(String(part))));
  return { url: line.split(" ")[0].replace(/\/$/, ""), close: () => child.kill() };
}

const call = (name, given) => `<tool_call>\n${JSON.stringify({ name, arguments: given })}\n</tool_call>`;

// `agent`: a program of node_modules/.bin; what its task's first two calls are, in its own tools; how it is told the
// address, asked something, and asked to go on.
async function main(agent) {
  const folder = fs.realpathSync(fs.mkdtempSync(path.join(os.tmpdir(), "carousel-agent-")));
  const cwd = path.join(folder, "work");
  fs.mkdirSync(cwd);
  fs.writeFileSync(path.join(cwd, "notes.txt"), `${NOTE}\n`);
  const home = path.join(folder, "home");
  fs.mkdirSync(home);
  const bin = path.join(NODE_PATH, ".bin");
  const env = { HOME: home, PATH: `${bin}:${process.env.PATH}`, NO_PROXY: "127.0.0.1", ...agent.env };
  const ask = async (seen, args, seconds) => {
    const told = agent.tell({ home, url: seen.url, model: CAROUSEL_TOOLS_MODEL });
    const before = seen.exchanges.length;
    const done = await run(path.join(bin, agent.program), [...told.args, ...args], { cwd, env: { ...env, ...told.env }, seconds });
    return { ...done, exchanges: seen.exchanges.slice(before) };
  };
  try {
    await threeSteps(agent, folder, cwd, ask);
    await realModel(agent, ask);
  } finally {
    fs.rmSync(folder, { recursive: true, force: true });
  }
  process.exit(0);
}

const asked = (turn) => turn.exchanges.filter((each) => each.method === "POST" && each.sent?.tools?.length);
const refused = (turn) => turn.exchanges.filter((each) => each.status !== 200 && each.method === "POST").map((each) => [each.path, each.status, each.said.slice(0, 500)]);

async function threeSteps(agent, folder, cwd, ask) {
  const file = path.join(cwd, "notes.txt");
  const steps = [...agent.steps(cwd, file), `The note says: ${NOTE}`];
  const server = await scripted(folder, steps.map((step) => (typeof step === "string" ? step : call(...step))));
  const seen = await proxy(server.url);
  const turn = await ask(seen, agent.ask("Which files are in this folder, and what does notes.txt say?"), 120);
  check("a task of three steps: nothing is refused", refused(turn).length === 0, refused(turn));
  check("a task of three steps: each step is carried", asked(turn).length === 3, [turn.exchanges.map((each) => [each.path, each.status]), turn.output.slice(-1500)]);
  const last = JSON.stringify(asked(turn)[2].sent);
  check("a task of three steps: both results come back", last.includes("notes.txt") && last.includes(NOTE), last.slice(-2000));
  check("a task of three steps: the answer is told", turn.output.includes(NOTE), turn.output);
  seen.close();
  server.close();
}

async function realModel(agent, ask) {
  const seen = await proxy(CAROUSEL_URL);
  const turns = [];
  for (const args of [agent.ask("Say hello."), agent.goOn("Say goodbye."), agent.ask("Say good morning.")]) {
    const turn = await ask(seen, args, TURN_SECONDS);
    check(`turn ${turns.length + 1}: nothing is refused`, refused(turn).length === 0, refused(turn));
    check(`turn ${turns.length + 1}: asked with tools`, asked(turn).length > 0, turn.output.slice(-1500));
    for (const exchange of asked(turn))
      for (const { name, text } of calls(exchange)) {
        const known = JSON.stringify(exchange.sent.tools).includes(JSON.stringify(name));
        check(`turn ${turns.length + 1}: the call is of a tool that there is, and whole`, known && (asJson(text) !== null || isCut(exchange)), [name, text]);
      }
    turns.push(turn);
  }
  const first = usage(asked(turns[0])[0]);
  check("the usage is told", first.prompt > 1000, first);
  const seconds = (exchange) => ((exchange.first - exchange.started) / 1000).toFixed(1);
  console.log(`first prompt: ${first.prompt} tokens, first byte after ${seconds(asked(turns[0])[0])} s`);
  for (const [what, turn] of [["the second turn", turns[1]], ["a new session", turns[2]]]) {
    const [before, now] = [asked(turns[0])[0], asked(turn)[0]];
    const { cached } = usage(now);
    const most = Math.round(shared(before.sent, now.sent) * first.prompt);
    console.log(`${what}: ${cached} tokens cached, of some ${most} that are shared; first byte after ${seconds(now)} s`);
    check(`${what} finds what it shares with the first in the prefix cache`, cached >= 0.9 * most, [cached, most]);
  }
  seen.close();
}

module.exports = { main };
