// The page: follows /live for as long as somebody looks, and shows each frame.

import { followRide, ownRequest } from "./ask.js";
import { BlockMap } from "./blocks.js";
import { eventsOf, problemOf } from "./events.js";
import { askForKey, authorization, hasKey, onChangeOfKey } from "./key.js";
import { showRiders } from "./riders.js";
import { Ring } from "./ring.js";
import { Tile } from "./tiles.js";

const RETRY_MS = 1000;
const SILENCE_MS = 5000; // frames come several times a second: after such a silence nobody is there

const byId = (id) => document.getElementById(id);
const ring = new Ring();
const blocks = new BlockMap();
const tiles = { speed: new Tile("speed"), ttft: new Tile("ttft"), itl: new Tile("itl") };
let viewer = null;
let numSeats = 0;

class Refused extends Error {}

function setConnection(state, text) {
  byId("connection").dataset.state = document.body.dataset.connection = state;
  byId("connection").textContent = text;
}

function tell(problem) {
  byId("notice").hidden = !problem;
  byId("notice").textContent = problem ?? "";
}

function welcome(event) {
  viewer = event.viewer;
  const parts = [event.model, event.products, event.device];
  byId("model").textContent = parts.join(" · ");
  document.title = `Carousel · ${event.model}`;
  ring.build(event.num_seats);
  blocks.build(event);
  numSeats = event.num_seats;
  setConnection("live", "Live");
}

/** Whose a rider is, for this viewer. */
function describe(rider) {
  if (rider.request === ownRequest) return { mine: true, own: true, who: "your request" };
  if (viewer === null) return { mine: false, who: `request ${rider.request}` };
  const mine = rider.colour === viewer.colour;
  return { mine, who: mine ? `${viewer.name} (you)` : "somebody" };
}

function show(frame) {
  const numWaiting = frame.waiting.reduce((sum, group) => sum + group.count, 0);
  const empty = frame.riders.length + numWaiting === 0;
  ring.show(frame.riders, frame.waiting, describe);
  showRiders(frame, describe, viewer);
  followRide(frame.riders);
  blocks.show(frame.blocks);
  byId("hub").classList.toggle("empty", empty);
  byId("hub-value").textContent = empty ? "All free" : frame.riders.length;
  byId("hub-unit").textContent = empty ? "Ask something, and take the first seat" : `of ${numSeats} seats taken`;
  byId("hub-turn").textContent = frame.step && !empty ? `a turn takes ${join(time(frame.step))}` : "";
  byId("queue-label").textContent = numWaiting ? `${numWaiting.toLocaleString("en")} waiting for a first token` : "nobody waits";
  showSpeed(frame);
  tell(frame.error && `The engine is gone: ${frame.error}.`);
}

function showSpeed({ tokens_per_second: speed, prompt_tokens_per_second: reading, guessed_tokens_per_second: guessed, ttft, itl }) {
  const round = (number) => Math.round(number).toLocaleString("en");
  const share = speed > 0 ? Math.min(1, guessed / speed) : 0;
  const more = `and ${round(reading)} of prompts` + (share >= 0.005 ? `; ${Math.round(100 * share)} % guessed` : "");
  tiles.speed.show({ value: speed, number: round(speed), unit: "a second", more });
  tiles.ttft.show({ value: ttft?.p50 ?? null, peak: ttft?.max ?? null, ...time(ttft), more: ttft && worst(ttft) });
  tiles.itl.show({ value: itl?.p50 ?? null, peak: itl?.max ?? null, ...time(itl), more: itl && worst(itl) });
}

const join = ({ number, unit }) => `${number} ${unit}`;
const worst = ({ max }) => `longest ${join(time({ p50: max }))}`;

function time(latency) {
  if (!latency) return { number: "–", unit: "" };
  const seconds = latency.p50;
  return seconds < 1 ? { number: (1000 * seconds).toFixed(0), unit: "ms" } : { number: seconds.toFixed(1), unit: "s" };
}

/** One connection, from its beginning to its end. */
async function follow(controller) {
  let silence = setTimeout(() => controller.abort(), SILENCE_MS);
  try {
    const response = await fetch("live", { headers: authorization(), signal: controller.signal, cache: "no-store" });
    if (response.status === 401) throw new Refused(await problemOf(response));
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const event of eventsOf(response)) {
      clearTimeout(silence);
      silence = setTimeout(() => controller.abort(), SILENCE_MS);
      if (event.event === "welcome") welcome(event);
      else show(event);
    }
  } finally {
    clearTimeout(silence);
  }
}

const visible = () =>
  new Promise((resolve) => {
    const look = () => document.hidden || (document.removeEventListener("visibilitychange", look), resolve());
    document.addEventListener("visibilitychange", look);
    look();
  });

async function main() {
  const settings = await (await fetch("page/server.json")).json();
  byId("model").textContent = settings.model;
  let controller = new AbortController();
  onChangeOfKey(() => controller.abort());
  document.addEventListener("visibilitychange", () => document.hidden && controller.abort());
  for (;;) {
    await visible();
    if (settings.needs_key && !hasKey()) {
      setConnection("key", "Needs a key");
      await askForKey();
    }
    controller = new AbortController();
    try {
      await follow(controller);
    } catch (error) {
      if (error instanceof Refused) {
        setConnection("key", "Needs a key");
        await askForKey(error.message);
        continue;
      }
    }
    if (document.hidden || (settings.needs_key && !hasKey())) continue;
    setConnection("lost", "Reconnecting");
    await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
  }
}

main();
