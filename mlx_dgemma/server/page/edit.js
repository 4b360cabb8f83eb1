// A text and an instruction: what stays, what goes, what comes.
import { Canvas, seedButton, statistics } from "./answer.js";
import { chunks, post, runner } from "./api.js";
import { changed } from "./diff.js";
import { $, button, copyButton, make } from "./dom.js";
import { seeded } from "./settings.js";

$("strength").oninput = () => { $("strength-shown").textContent = `${Math.round(100 * $("strength").value)} %`; };

runner($("edit-form"), $("edit-go"), async (signal) => {
  const input = $("edit-text").value, instruction = $("edit-instruction").value.trim();
  if (!input.trim()) throw new Error("There is no text to edit; write one.");
  if (!instruction) throw new Error("There is no instruction; write what to change.");
  const canvas = new Canvas(), shown = $("edit-shown"), foot = $("edit-foot");
  shown.replaceChildren(canvas.node);
  $("edit-result").hidden = false;
  $("edit-result").setAttribute("aria-busy", "true");
  foot.textContent = "Reading the text";
  let text = "", stats;
  try {
    const body = { input, instruction, strength: Number($("strength").value), ...seeded(), stream: true, drafts: true };
    for await (const chunk of chunks(await post("/v1/edits", body, signal))) {
      if (chunk.draft) canvas.draw(chunk.draft, foot);
      stats = chunk.stats ?? stats;
      text += chunk.choices?.[0]?.text ?? "";
    }
  } catch (error) {
    $("edit-result").hidden = true;
    throw error;
  } finally {
    canvas.clear();
    $("edit-result").removeAttribute("aria-busy");
  }
  const [nodes, summary] = changed(input, text);
  let plain = false;
  const show = () => shown.replaceChildren(...(plain ? [text] : nodes));
  const toggle = button("Without marks", () => {
    plain = !plain;
    toggle.setAttribute("aria-pressed", String(plain));
    show();
  });
  toggle.setAttribute("aria-pressed", "false");
  show();
  const keep = () => {
    $("edit-text").value = text;
    $("edit-text").focus();
  };
  foot.replaceChildren(make("strong", "", summary), ...statistics(stats).map((part) => make("span", "", part)),
    ...seedButton(stats?.seed), toggle, copyButton(() => text, "Copy the result"),
    button("Go on with it", keep, "Put the result above"));
});
