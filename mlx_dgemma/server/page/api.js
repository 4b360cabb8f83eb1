// Requests to the server, their errors and their streams.
import { $, tell } from "./dom.js";

let model = "";

function headers() {
  let key = null;
  try { key = sessionStorage.getItem("key"); } catch { /* nothing is kept */ }
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

// Asks for the model's name; returns whether it is known now.
export async function greet() {
  const response = await fetch("/v1/models", { headers: headers() }).catch(() => null);
  if (response?.status === 401) $("keyrow").hidden = false;
  if (!response?.ok) return false;
  model = (await response.json()).data[0].id;
  $("model").textContent = model.split("/").pop();
  $("model").title = model;
  return true;
}

async function refused(response) {
  if (response.status === 401) {
    $("keyrow").hidden = false;
    $("key").focus();
  }
  const body = await response.json().catch(() => null);
  const said = body?.error?.message;
  return new Error(typeof said === "string" ? said : `The server answers ${response.status} ${response.statusText}.`);
}

// Posts a JSON body; the response is one that succeeded.
export async function post(path, body, signal) {
  if ($("key").value) {
    try { sessionStorage.setItem("key", $("key").value); } catch { /* asked for again after a reload */ }
  }
  $("keyrow").hidden = true;
  if (!model) await greet();
  const whole = model ? { model, ...body } : body;
  const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(whole), signal })
    .catch((error) => { throw error.name === "AbortError" ? error : new Error("The server cannot be reached."); });
  if (!response.ok) throw await refused(response);
  return response;
}

// The JSON of every data: line of a stream, which ends with [DONE].
export async function* chunks(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection broke before the answer was whole.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      yield chunk;
    }
  }
}

const running = new Set();  // AbortControllers; Escape stops all
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) stop();
});

export function stop() {
  for (const one of running) one.abort();
}

// A form whose button stops what it started. `act` takes an AbortSignal; what it throws is told.
export function runner(form, go, act) {
  let controller = null;
  const name = go.textContent;
  const show = () => {
    go.textContent = controller ? "Stop" : name;
    go.classList.toggle("stop", Boolean(controller));
  };
  form.onsubmit = async (event) => {
    event.preventDefault();
    if (controller) return controller.abort();
    controller = new AbortController();
    running.add(controller);
    tell("");
    show();
    try {
      await act(controller.signal);
    } catch (error) {
      if (error.name !== "AbortError") tell(error.message);
    }
    running.delete(controller);
    controller = null;
    show();
  };
  go.onclick = (event) => { if (event.detail > 1) event.preventDefault(); };  // a double click does not stop at once
  return { get busy() { return Boolean(controller); }, submit: () => form.requestSubmit() };
}
