// "What happened here": the steps of one's own answer, token by token.

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** A token's text, or its bytes where they are only a part of a character. */
const readable = (text) =>
  /^bytes:(\\x[0-9a-f]{2})+$/.test(text) ? `⟨${text.slice("bytes:".length).replaceAll("\\x", " ").trim()}⟩` : text;
/** Blanks and line breaks that can be seen. */
const shown = (text) => readable(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
const percent = (share) => `${(100 * share).toFixed(share < 0.1 ? 1 : 0)} %`;
const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** What went into a step, and what came out. */
function stepLine(step) {
  const cached = step.cached ? `${counted(step.cached, "token")} came from the cache` : "Nothing was in the cache";
  const input = step.input.length === 1 ? `“${shown(step.input[0].text)}” went in` : `${step.input.length} went in`;
  const guesses = step.drafted.length ? `, with ${step.drafted.length} guessed` : "";
  const company = step.sequences > 1 ? `, for ${step.sequences} answers together` : "";
  return `Step ${step.step}: ${cached}, ${input}${guesses}. It took ${step.milliseconds.toFixed(1)} ms${company}.`;
}

/** How one token was chosen. */
function choiceLine(token, wasGuessed) {
  const guessed = wasGuessed ? " It had been guessed, and cost no step of its own." : "";
  if (token.how === "greedy") return `The likeliest was taken.${guessed}`;
  const [low, high] = token.part;
  return `Drawn from ${counted(token.candidates, "candidate")}: the number ${token.number.toFixed(4)} fell on its part, ${low.toFixed(4)} to ${high.toFixed(4)}.${guessed}`;
}

function bars(token) {
  const list = element("ol", "likeliest");
  const likeliest = token.likeliest.some((other) => other.id === token.id)
    ? token.likeliest
    : [...token.likeliest, token];
  const most = Math.max(...likeliest.map((other) => other.probability));
  for (const other of likeliest) {
    const item = element("li", other.id === token.id ? "taken" : "");
    const bar = element("i", "bar");
    bar.style.width = `${(100 * other.probability) / most}%`;
    item.append(element("code", "", shown(other.text)), element("span", "", percent(other.probability)), bar);
    list.append(item);
  }
  return list;
}

/** A closed view of an answer's steps, to be put behind it; null where there are none. */
export function whatHappened(steps) {
  const tokens = steps.flatMap((step) => step.tokens.map((token, place) => ({ step, token, guessed: place < step.kept })));
  if (!tokens.length) return null;
  const view = element("details", "happened");
  view.append(element("summary", "", "What happened here"));
  const kept = tokens.filter((each) => each.guessed).length;
  const cached = steps[0].cached ? `; ${counted(steps[0].cached, "token")} of the prompt had been computed for an earlier one` : "";
  const guesses = kept ? `, as ${kept} had been guessed right` : "";
  const summary = `${counted(tokens.length, "token")} in ${counted(steps.length, "step")}${guesses}${cached}. Choose a token to see what else could have come.`;
  view.append(element("p", "", summary));
  const text = element("div", "tokens");
  const detail = element("div", "detail");
  detail.setAttribute("aria-live", "polite");
  for (const { step, token, guessed } of tokens) {
    const button = element("button", guessed ? "token guessed" : "token", readable(token.text).replaceAll("\n", "⏎") || "␃");
    button.type = "button";
    button.style.setProperty("--doubt", `${Math.round(60 * (1 - token.probability))}%`);
    button.title = percent(token.probability);
    button.addEventListener("click", () => {
      text.querySelector("[aria-pressed]")?.removeAttribute("aria-pressed");
      button.setAttribute("aria-pressed", "true");
      detail.replaceChildren(element("p", "", stepLine(step)), bars(token), element("p", "", choiceLine(token, guessed)));
    });
    text.append(button);
    if (token.text.includes("\n")) text.append(element("br", ""));
  }
  view.append(detail, text);
  view.addEventListener("toggle", () => view.open && !detail.hasChildNodes() && text.firstChild.click(), { once: true });
  return view;
}
