// A figure and its last minute.

const NUM_POINTS = 240;
const WIDTH = 240;
const HEIGHT = 44;

export class Tile {
  #values = [];
  #peaks = [];

  constructor(id) {
    const tile = document.getElementById(id);
    tile.insertAdjacentHTML(
      "beforeend",
      `<p class="value">–</p><p class="more">&nbsp;</p>
       <svg viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none" aria-hidden="true">
         <path class="area"/><path class="peak"/><path class="line"/></svg>`,
    );
    [this.value, this.more] = tile.querySelectorAll("p");
    [this.area, this.peak, this.line] = tile.querySelectorAll("path");
  }

  /** `value` and `peak`: numbers, or null for none; `number`, `unit` and `more`: how to say them. */
  show({ value, peak = null, number, unit, more }) {
    this.value.textContent = number;
    const small = document.createElement("small");
    small.textContent = unit;
    this.value.append(small);
    this.more.textContent = more || "\u00a0";
    this.#values = [...this.#values, value].slice(-NUM_POINTS);
    this.#peaks = [...this.#peaks, peak].slice(-NUM_POINTS);
    const highest = Math.max(1e-9, ...this.#values);
    const top = Math.min(4 * highest, 1.1 * Math.max(highest, ...this.#peaks)); // peaks do not flatten the line
    this.line.setAttribute("d", path(this.#values, top));
    this.peak.setAttribute("d", path(this.#peaks, top));
    this.area.setAttribute("d", path(this.#values, top, true));
  }
}

/** A line through the values, the newest at the right; it has gaps where there are none. */
function path(values, top, closed = false) {
  const first = NUM_POINTS - values.length;
  const step = WIDTH / (NUM_POINTS - 1);
  let d = "";
  let start = null;
  const close = (place) => {
    if (closed && start !== null) d += `L${((first + place) * step).toFixed(1)} ${HEIGHT}L${start} ${HEIGHT}Z`;
    start = null;
  };
  values.forEach((value, place) => {
    if (value === null) {
      close(place - 1);
      return;
    }
    const x = ((first + place) * step).toFixed(1);
    d += `${start === null ? "M" : "L"}${x} ${(HEIGHT - (HEIGHT * value) / top).toFixed(1)}`;
    start ??= x;
  });
  close(values.length - 1);
  return d;
}
