// What is set for every answer: it survives a reload, except for the seed.
import { $, kept } from "./dom.js";

const KEPT = ["system", "mode", "temperature", "tokens"];
const CANVASES = ["exact", "fast"];

export function restore() {
  let found = null;
  try { found = JSON.parse(kept.read("settings") ?? "null"); } catch { /* begin anew */ }
  for (const name of KEPT) {
    if (typeof found?.[name] === "string") $(name).value = found[name];
  }
  if (!$("mode").value) $("mode").value = "";
  $("thinking").checked = found?.thinking === true;
  summarize();
}

function keep() {
  const values = Object.fromEntries(KEPT.map((name) => [name, $(name).value]));
  kept.write("settings", JSON.stringify({ ...values, thinking: $("thinking").checked }));
  summarize();
}

// What differs from the defaults, beside the prompt.
function summarize() {
  const parts = [];
  if ($("system").value.trim()) parts.push("system prompt");
  if ($("mode").value) parts.push($("mode").selectedOptions[0].textContent);
  if ($("temperature").value) parts.push(`temperature ${$("temperature").value}`);
  if ($("tokens").value) parts.push(`${$("tokens").value} tokens`);
  if ($("seed").value) parts.push(`seed ${$("seed").value}`);
  $("summary").textContent = parts.join(" · ");
  $("summary").hidden = !parts.length;
}

// The settings as fields of a request.
export function fields() {
  const mode = $("mode").value, set = {};
  if (CANVASES.includes(mode)) set[mode] = true;
  else if (mode) set.mode = mode;
  if ($("temperature").value) set.temperature = Number($("temperature").value);
  if ($("thinking").checked) set.thinking = true;
  if ($("tokens").value) set.max_tokens = Number($("tokens").value);
  if ($("seed").value) set.seed = Number($("seed").value);
  return set;
}

// The part of them that every endpoint takes.
export function seeded() {
  return $("seed").value ? { seed: Number($("seed").value) } : {};
}

export function showSystem(text) {
  $("system").value = text;
  keep();
}

for (const one of ["open-settings", "summary"]) $(one).onclick = () => $("settings").showModal();
$("settings").oninput = keep;
$("thinking").onchange = keep;
$("settings").onclick = (event) => { if (event.target === $("settings")) $("settings").close(); };  // outside of it
$("reset").onclick = () => {
  for (const name of [...KEPT, "seed"]) $(name).value = "";
  keep();
};
