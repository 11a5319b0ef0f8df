// Who rides and who waits, in words: as a legend of the colours, and as a table for those who want one.

import { colourOf } from "./colours.js";

const MOST = 9;
const list = document.getElementById("riders");
const table = document.getElementById("table");

function chip({ text, hidden = "", more, colour, mine = false }) {
  const item = document.createElement("li");
  item.classList.toggle("mine", mine);
  const dot = document.createElement("i");
  dot.className = "dot";
  if (colour) dot.style.background = colour;
  const small = document.createElement("small");
  small.textContent = more;
  const unseen = document.createElement("span");
  unseen.className = "hidden";
  unseen.textContent = hidden;
  item.append(dot, unseen, text, small);
  return item;
}

export function showRiders(frame, describe, viewer) {
  list.replaceChildren(...(viewer ? byUser(frame, viewer) : byRequest(frame, describe)));
  if (table.open) showTable(frame.riders, describe);
}

function byUser({ riders, waiting }, viewer) {
  const users = new Map([[viewer.colour, { riding: 0, waiting: 0 }]]);
  const of = (colour) => users.get(colour) ?? users.set(colour, { riding: 0, waiting: 0 }).get(colour);
  for (const rider of riders) of(rider.colour).riding += 1;
  for (const group of waiting) of(group.colour).waiting += group.count;
  const others = [...users].filter(([colour]) => colour !== viewer.colour).sort(([a], [b]) => a - b);
  const shown = [[viewer.colour, users.get(viewer.colour)], ...others].slice(0, MOST);
  const chips = shown.map(([number, user]) => {
    const mine = number === viewer.colour;
    const counts = [user.riding && `${user.riding} riding`, user.waiting && `${user.waiting} waiting`];
    return chip({
      text: mine ? `${viewer.name} (you)` : "",
      hidden: mine ? "" : "somebody",
      more: counts.filter(Boolean).join(", ") || "not here",
      colour: colourOf(number),
      mine,
    });
  });
  if (users.size > MOST) chips.push(chip({ text: `${users.size - MOST} more`, more: "" }));
  return chips;
}

function byRequest({ riders }, describe) {
  const mine = riders.filter((rider) => describe(rider).mine);
  const chips = mine.map((rider) =>
    chip({ text: "your request", more: `seat ${rider.seat}`, colour: colourOf(rider.colour), mine: true }),
  );
  if (riders.length > mine.length) chips.push(chip({ text: "each request has its own colour", more: "" }));
  return chips;
}

function showTable(riders, describe) {
  const rows = [...riders].sort((a, b) => a.seat - b.seat).map((rider) => {
    const row = document.createElement("tr");
    const { who } = describe(rider);
    const cells = [rider.seat, who, `${rider.computed < rider.prompt ? `${rider.computed} of ` : ""}${rider.prompt}`];
    for (const text of [...cells, `${rider.answer} of ${rider.limit}`]) row.insertCell().textContent = text;
    return row;
  });
  table.querySelector("tbody").replaceChildren(...rows);
}
