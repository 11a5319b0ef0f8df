// From the numbers that stand for users to colours that people can tell apart.

const PALETTE = [
  "#4c7dff", "#ff8a3d", "#2fb88a", "#e3549b", "#9b6bff", "#e3ae23",
  "#23b5d3", "#ef5b5b", "#86ab35", "#b97a52", "#d17fe0", "#7d8fb3",
];
const FORGET_MS = 20_000;

const known = new Map(); // number: {slot, seen}

/** A colour for a number, its own as long as there are no more than twelve at a time. */
export function colourOf(number) {
  const now = performance.now();
  let entry = known.get(number);
  if (entry === undefined) {
    for (const [other, { seen }] of known) if (now - seen > FORGET_MS) known.delete(other);
    const uses = PALETTE.map(() => 0);
    for (const { slot } of known.values()) uses[slot] += 1;
    const wished = number % PALETTE.length;
    const fewest = Math.min(...uses);
    const slot = PALETTE.map((_, step) => (wished + step) % PALETTE.length).find((each) => uses[each] === fewest);
    known.set(number, (entry = { slot }));
  }
  entry.seen = now;
  return PALETTE[entry.slot];
}
