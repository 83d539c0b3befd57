"use strict";

const at = (id) => document.getElementById(id);
let image = null; // the chosen image as a data URL
let running = null; // AbortController of the answer that is being read

function say(id, text) {
  at(id).textContent = text;
  at(id).hidden = !text;
}

function choose(file) {
  if (!file) return;
  say("error", "");
  const reader = new FileReader();
  reader.onerror = () => say("error", `The file cannot be read: ${reader.error.message}`);
  reader.onload = () => {
    image = reader.result;
    at("shown").src = URL.createObjectURL(file);
    at("shown").hidden = false;
    at("hint").hidden = true;
  };
  reader.readAsDataURL(file);
}

function headers() {
  const token = at("token").value;
  return {
    "content-type": "application/json",
    ...(token ? { authorization: `Bearer ${token}` } : {}),
  };
}

async function reason(response) {
  let text = `The server answered ${response.status}.`;
  try {
    text = (await response.json()).error.message;
  } catch {
    // Not the server's JSON (a proxy's page): the status says what there is to say.
  }
  if (response.status === 401) at("token-row").hidden = false;
  return text;
}

/** Yields the objects of an event stream; lines may arrive in any pieces. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("The server broke off.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((l) => l.startsWith("data: "))) {
      if (line === "data: [DONE]") return;
      yield JSON.parse(line.slice(6));
    }
  }
}

async function ask() {
  const text = at("question").value.trim();
  if (!text) return;
  const content = [{ type: "text", text }];
  if (image) content.unshift({ type: "image_url", image_url: { url: image } });
  say("error", "");
  at("answer").textContent = "";
  at("facts").textContent = "";
  const start = performance.now();
  let first = null;
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: headers(),
    signal: running.signal,
    body: JSON.stringify({
      messages: [{ role: "user", content }],
      stream: true,
      stream_options: { include_usage: true },
    }),
  });
  if (!response.ok) throw new Error(await reason(response));
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const piece = event.choices[0]?.delta.content;
    if (piece) {
      first ??= performance.now() - start;
      at("answer").textContent += piece;
    }
    if (event.usage) {
      const { prompt_tokens: prompt, completion_tokens: made } = event.usage;
      const whole = (performance.now() - start) / 1000;
      at("facts").textContent =
        `${prompt} + ${made} tokens, first text after ${((first ?? 0) / 1000).toFixed(2)} s, ` +
        `all after ${whole.toFixed(2)} s`;
    }
  }
}

at("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  if (running) return;
  running = new AbortController();
  at("ask").disabled = true;
  at("stop").disabled = false;
  try {
    await ask();
  } catch (error) {
    say("error", error.name === "AbortError" ? "Stopped." : error.message);
  } finally {
    running = null;
    at("ask").disabled = false;
    at("stop").disabled = true;
  }
});

at("stop").addEventListener("click", () => running?.abort());
at("file").addEventListener("change", (event) => choose(event.target.files[0]));
document.addEventListener("paste", (event) => choose(event.clipboardData.files[0]));
for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
  at("drop").addEventListener(name, (event) => {
    event.preventDefault();
    at("drop").classList.toggle("over", name === "dragenter" || name === "dragover");
    if (name === "drop") choose(event.dataTransfer.files[0]);
  });
}
fetch("health")
  .then((response) => response.json())
  .then((health) => (at("model").textContent = health.model))
  .catch(() => say("error", "The server does not answer."));
