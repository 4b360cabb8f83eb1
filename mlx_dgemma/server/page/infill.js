// A text with a hole: what fills it stands marked between the parts that stay.
import { Canvas, seedButton, statistics } from "./answer.js";
import { chunks, post, runner } from "./api.js";
import { $, button, copyButton, make, unseen } from "./dom.js";
import { seeded } from "./settings.js";

const HOLE = "[hole]";

$("make-hole").onclick = () => {
  const field = $("infill-text"), { selectionStart: start, selectionEnd: end } = field;
  const cut = (part) => part.replaceAll(HOLE, "");
  const before = cut(field.value.slice(0, start));
  field.value = before + HOLE + cut(field.value.slice(end));
  field.focus();
  field.setSelectionRange(before.length, before.length + HOLE.length);
};

runner($("infill-form"), $("infill-go"), async (signal) => {
  const parts = $("infill-text").value.split(HOLE);
  if (parts.length !== 2) {
    const what = parts.length === 1 ? "There is no hole" : `There are ${parts.length - 1} holes`;
    throw new Error(`${what} in the text; write ${HOLE} in one place.`);
  }
  const [before, behind] = parts;
  const canvas = new Canvas(), hole = make("mark", "fill", canvas.node), foot = $("infill-foot");
  const show = (...inside) => {
    $("infill-shown").replaceChildren(make("span", "fixed", before), ...inside, make("span", "fixed", behind));
  };
  show(hole);
  $("infill-result").hidden = false;
  $("infill-result").setAttribute("aria-busy", "true");
  foot.textContent = "Reading the text";
  let text = "", stats;
  try {
    const body = { prompt: before, suffix: behind, ...seeded(), stream: true, drafts: true };
    for await (const chunk of chunks(await post("/v1/completions", body, signal))) {
      if (chunk.draft) canvas.draw(chunk.draft, foot);
      stats = chunk.stats ?? stats;
      text += chunk.choices?.[0]?.text ?? "";
    }
  } catch (error) {
    $("infill-result").hidden = true;
    throw error;
  } finally {
    canvas.clear();
    $("infill-result").removeAttribute("aria-busy");
  }
  show(unseen("[filled: "), make("mark", "fill", text), unseen("]"));
  const whole = before + text + behind;
  const keep = () => {
    $("infill-text").value = whole;
    $("infill-text").focus();
  };
  foot.replaceChildren(...(text ? [] : ["Nothing came"]), ...statistics(stats).map((part) => make("span", "", part)),
    ...seedButton(stats?.seed), copyButton(() => text, "Copy the fill"), copyButton(() => whole, "Copy all"),
    button("Go on with it", keep, "Put the filled text above"));
});
