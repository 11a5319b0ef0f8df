// The ring of seats. It turns while somebody rides.

import { colourOf } from "./colours.js";

const CENTRE = 360;
const INNER = 154;
const OUTER = 284;
const RIM = 302;
const QUEUE_RADIUS = 318;
const QUEUE_ROWS = 3;
const DOTS_PER_ROW = 40;
const DOT_GAP = 15;
const SECONDS_PER_TURN = 90;
const LENGTH = OUTER - INNER;

const svg = (name, attributes = {}) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

const polar = (radius, degrees) => {
  const angle = (degrees * Math.PI) / 180;
  return [CENTRE + radius * Math.sin(angle), CENTRE - radius * Math.cos(angle)];
};

class Seat {
  constructor(number, numSeats) {
    const pitch = (2 * Math.PI * INNER) / numSeats;
    this.width = Math.min(30, pitch * 0.66);
    this.group = svg("g", { class: "seat", transform: `rotate(${(360 * number) / numSeats} ${CENTRE} ${CENTRE})` });
    const place = { x: CENTRE - this.width / 2, width: this.width, rx: this.width / 2 };
    // Turned by half a turn, so that height grows from the hub to the rim.
    const turned = { transform: `rotate(180 ${CENTRE} ${CENTRE})`, y: CENTRE + INNER };
    this.track = svg("rect", { ...place, ...turned, class: "track", height: LENGTH });
    this.prompt = svg("rect", { ...place, ...turned, class: "prompt" });
    this.answer = svg("rect", { ...place, ...turned, class: "answer" });
    this.title = svg("title");
    const bulb = { cx: CENTRE, cy: CENTRE - (OUTER + RIM) / 2, r: Math.min(4.5, 2 + this.width / 8), class: "bulb" };
    this.bulb = svg("circle", bulb);
    this.group.append(this.track, this.prompt, this.answer, this.bulb, this.title);
    this.empty();
  }

  #fill(rect, share) {
    rect.style.visibility = share > 0 ? "visible" : "hidden";
    rect.style.height = `${this.width + share * (LENGTH - this.width)}px`; // no less than its two round ends
  }

  empty() {
    if (this.request === null) return;
    this.request = null;
    this.group.setAttribute("class", "seat leaving");
    this.title.textContent = "free";
  }

  take(rider, { mine, own, who }) {
    if (this.request !== rider.request) {
      this.request = rider.request;
      for (const rect of [this.prompt, this.answer]) {
        rect.style.transition = "none"; // the next rider starts from nothing, and does not shrink into it
        this.#fill(rect, 0);
        rect.getBoundingClientRect();
        rect.style.transition = "";
      }
    }
    const colour = colourOf(rider.colour);
    const reading = rider.computed < rider.prompt;
    this.group.setAttribute("class", `seat${reading ? " reading" : ""}${mine ? " mine" : ""}${own ? " own" : ""}`);
    this.prompt.style.fill = this.answer.style.fill = colour;
    this.bulb.style.fill = mine ? "" : colour;
    this.#fill(this.prompt, Math.min(1, rider.computed / rider.prompt));
    this.#fill(this.answer, Math.min(1, rider.answer / rider.limit));
    this.title.textContent = `seat ${rider.seat}, ${who}: ${
      reading ? `${rider.computed} of ${rider.prompt} tokens of the prompt` : `${rider.answer} tokens of the answer`
    }`;
  }
}

export class Ring {
  #ring = document.getElementById("ring");
  #around = document.getElementById("surroundings");
  #seats = [];
  #queue = svg("g");
  #motion = null;

  build(numSeats) {
    this.#seats = Array.from({ length: numSeats }, (_, number) => new Seat(number, numSeats));
    const canopy = Array.from({ length: 12 }, (_, number) => {
      const [ax, ay] = polar(INNER - 10, 30 * number);
      const [bx, by] = polar(INNER - 10, 30 * number + 15);
      const arc = `A${INNER - 10} ${INNER - 10} 0 0 1 ${bx} ${by}`;
      return svg("path", { class: "canopy", d: `M${CENTRE} ${CENTRE}L${ax} ${ay}${arc}Z` });
    });
    this.#ring.replaceChildren(
      svg("circle", { class: "rim", cx: CENTRE, cy: CENTRE, r: INNER - 10 }),
      ...canopy,
      ...this.#seats.map((seat) => seat.group),
    );
    const [x, y] = polar(RIM + 4, 0);
    this.#around.replaceChildren(
      svg("circle", { class: "rim", cx: CENTRE, cy: CENTRE, r: RIM }),
      svg("path", { class: "gate", d: `M${x} ${y}l-7 -13h14z` }),
      this.#queue,
    );
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) {
      this.#motion?.cancel();
      this.#motion = this.#ring.animate([{ rotate: "0deg" }, { rotate: "360deg" }], {
        duration: 1000 * SECONDS_PER_TURN,
        iterations: Infinity,
      });
    }
  }

  show(riders, waiting, describe) {
    const taken = new Set(riders.map((rider) => rider.seat));
    this.#seats.forEach((seat, number) => taken.has(number) || seat.empty());
    for (const rider of riders) this.#seats[rider.seat]?.take(rider, describe(rider));
    if (riders.length > 0) this.#motion?.play();
    else this.#motion?.pause();
    this.#showQueue(waiting);
    const numWaiting = waiting.reduce((sum, group) => sum + group.count, 0);
    const label = `${riders.length} of ${this.#seats.length} seats are taken, ${numWaiting} requests wait`;
    if (this.#around.getAttribute("aria-label") !== label) this.#around.setAttribute("aria-label", label);
  }

  /** Those who wait stand along the rim, user by user, in rows that begin at the gate. */
  #showQueue(waiting) {
    const colours = waiting.flatMap(({ colour, count }) => Array(count).fill(colour));
    const room = QUEUE_ROWS * DOTS_PER_ROW;
    const dots = colours.slice(0, room).map((colour, place) => {
      const radius = QUEUE_RADIUS + DOT_GAP * (place % QUEUE_ROWS);
      const step = (180 * DOT_GAP) / (Math.PI * QUEUE_RADIUS);
      const [cx, cy] = polar(radius, -4 - step * (Math.floor(place / QUEUE_ROWS) + 1));
      const dot = svg("circle", { cx, cy, r: 5.2, class: colour === null ? "unknown" : "known" });
      if (colour !== null) dot.style.fill = colourOf(colour);
      return dot;
    });
    if (colours.length > room) {
      const [x, y] = polar(QUEUE_RADIUS, -8 - (180 * DOT_GAP * (DOTS_PER_ROW + 2)) / (Math.PI * QUEUE_RADIUS));
      const more = svg("text", { x, y });
      more.textContent = `+${colours.length - room}`;
      dots.push(more);
    }
    this.#queue.replaceChildren(...dots);
  }
}
