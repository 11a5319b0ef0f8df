// The prompt box: one question at a time, through the API that everybody uses.

import { eventsOf, problemOf } from "./events.js";
import { whatHappened } from "./happened.js";
import { authorization } from "./key.js";

const MAX_TOKENS = 400;

const form = document.getElementById("ask-form");
const prompt = document.getElementById("prompt");
const send = document.getElementById("send");
const stop = document.getElementById("stop");
const answer = document.getElementById("answer");
const ride = document.getElementById("ride");

/** What the seat of the answer in flight is known by, or null. */
export let ownRequest = null;

/** Say where the answer in flight is. */
export function followRide(riders) {
  if (ownRequest === null) return;
  const own = riders.find((rider) => rider.request === ownRequest);
  if (own) ride.textContent = `in seat ${own.seat}, ${own.answer} tokens so far`;
}

function paragraph(className, text = "") {
  const element = document.createElement("p");
  element.className = className;
  element.textContent = text;
  answer.append(element);
  return element;
}

async function ask(question) {
  const controller = new AbortController();
  stop.onclick = () => controller.abort();
  [send.hidden, stop.hidden] = [true, false];
  answer.replaceChildren();
  paragraph("question", question);
  const text = paragraph("streaming");
  ride.textContent = "waiting for a seat";
  let ending = "";
  const steps = [];
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization() },
      body: JSON.stringify({
        messages: [{ role: "user", content: question }],
        max_tokens: MAX_TOKENS,
        temperature: 0.7,
        top_p: 0.9,
        stream: true,
        explain: true,
      }),
      signal: controller.signal,
    });
    if (!response.ok) throw new Error(await problemOf(response));
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      ownRequest = chunk.id.split("-")[1].slice(0, 8);
      const [choice] = chunk.choices;
      const atEnd = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 24;
      text.append(choice?.delta?.content ?? "");
      if (atEnd) answer.scrollTop = answer.scrollHeight;
      steps.push(...(choice?.explanation ?? []));
      if (choice?.finish_reason) ending = choice.finish_reason;
    }
    ride.textContent = ending === "length" ? `got off after ${MAX_TOKENS} tokens, the most this page asks for` : "got off";
    if (!ending) throw new Error("the server ended the answer early");
  } catch (error) {
    if (controller.signal.aborted) {
      ride.textContent = "stopped";
    } else {
      ride.textContent = "";
      const words = error instanceof TypeError ? "the server cannot be reached" : error.message;
      paragraph("failed", `That did not work: ${words}.`.replace(/\.\.$/, "."));
    }
  } finally {
    ownRequest = null;
    text.classList.remove("streaming");
    answer.append(whatHappened(steps) ?? "");
    [send.hidden, stop.hidden] = [false, true];
  }
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = prompt.value.trim();
  if (!question || send.hidden) return;
  prompt.value = "";
  ask(question);
});

prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    form.requestSubmit();
  }
});

for (const example of document.querySelectorAll("#examples button")) {
  example.addEventListener("click", () => {
    ask(example.textContent);
    prompt.focus();
  });
}
