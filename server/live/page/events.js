// Server-sent events over fetch, which unlike EventSource can send a key along.

/** The JSON objects of a response's events, as they come. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        if (event.startsWith("data: ") && event !== "data: [DONE]") yield JSON.parse(event.slice(6));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // whoever stops reading ends the request
  }
}

/** What went wrong, in the server's words where it has some. */
export async function problemOf(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `the server answered with status ${response.status}`;
}
