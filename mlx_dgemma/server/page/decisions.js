// A question and its possible answers: a bar for each, with its probability.
import { post, runner } from "./api.js";
import { $, make } from "./dom.js";
import { seeded } from "./settings.js";

const MOST = 101;  // bars

function kind() {
  $("options-row").hidden = $("kind").value !== "choice";
  $("range-row").hidden = $("kind").value !== "number";
}
$("kind").onchange = kind;
kind();

function question(instructions) {
  const type = $("kind").value;
  if (type === "predicate") return { type, name: "answer", instructions };
  if (type === "number") {
    const [min, max] = [$("least").value, $("most").value].map(Number);
    if (!(min < max)) throw new Error(`The range from ${min} to ${max} is empty; give a smaller and a larger number.`);
    return { type, name: "answer", instructions, min, max };
  }
  const options = [...new Set($("options").value.split("\n").map((line) => line.trim()).filter(Boolean))];
  if (options.length < 2) throw new Error("A decision needs two options or more; write each on its own line.");
  return { type, name: "answer", instructions, choices: options.map((value) => ({ value })) };
}

// [name, probability] of what the server answers, the most probable first where the order says nothing.
function outcomes(answer) {
  if (answer.type === "predicate") return [["Yes", answer.probability], ["No", 1 - answer.probability]];
  const pairs = answer.probabilities.slice(0, MOST).map(({ value, probability }) => [String(value), probability]);
  return answer.type === "number" ? pairs : pairs.sort((a, b) => b[1] - a[1]);
}

function bar([name, probability], best) {
  const share = Math.min(1, Math.max(0, Number(probability) || 0)), fill = make("div", "bar-fill");
  fill.style.width = `${100 * share}%`;
  const track = make("div", "bar-track", fill);
  track.setAttribute("aria-hidden", "true");
  const label = make("bdi", "bar-name", name), number = make("span", "bar-share", `${(100 * share).toFixed(1)} %`);
  return make("li", best ? "best" : "", label, number, track);
}

runner($("decide-form"), $("decide-go"), async (signal) => {
  const instructions = $("question").value.trim();
  if (!instructions) throw new Error("There is no question; write one.");
  const asked = { input: $("about").value, questions: [question(instructions)], list_choices: $("listed").checked };
  const body = { ...asked, ...seeded() };
  $("decide-result").setAttribute("aria-busy", "true");
  try {
    const { answers, usage } = await (await post("/v1/decisions", body, signal)).json();
    const found = outcomes(answers[0]), highest = Math.max(...found.map(([, share]) => share));
    $("bars").replaceChildren(...found.map((one) => bar(one, one[1] === highest)));
    const best = found.find(([, share]) => share === highest);
    $("decided").replaceChildren(make("bdi", "", best[0]), `, ${(100 * best[1]).toFixed(1)} %`);
    $("decide-foot").textContent = usage ? `${usage.input_tokens} tokens read, none written` : "";
    $("decide-result").hidden = false;
  } finally {
    $("decide-result").removeAttribute("aria-busy");
  }
});
