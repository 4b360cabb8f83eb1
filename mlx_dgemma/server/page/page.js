// The page: its tabs, its theme, the list of conversations at its side.
import { greet } from "./api.js";
import { begin, grow, resume } from "./chat.js";
import "./decisions.js";
import { $, kept, tell } from "./dom.js";
import "./edit.js";
import "./infill.js";
import { restore } from "./settings.js";

const TABS = ["chat", "infill", "edit", "decide"];
const wide = matchMedia("(min-width: 900px)");

function open(chosen, focus = false) {
  for (const name of TABS) {
    const here = name === chosen;
    $(`tab-${name}`).setAttribute("aria-selected", String(here));
    $(`tab-${name}`).tabIndex = here ? 0 : -1;
    $(name).hidden = !here;
  }
  tell("");
  if (focus) $(`tab-${chosen}`).focus();
  kept.write("tab", chosen);
  grow();
}

for (const [i, name] of TABS.entries()) {
  $(`tab-${name}`).onclick = () => open(name);
  $(`tab-${name}`).onkeydown = ({ key }) => {
    const to = { ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1 }[key];
    if (to !== undefined) open(TABS.at(to % TABS.length), true);
  };
}

function side(shown) {
  $("history").hidden = !shown;
  $("shade").hidden = !shown || wide.matches;
  $("side").setAttribute("aria-expanded", String(shown));
  if (wide.matches) kept.write("side", shown ? "open" : "closed");
}
const narrow = () => { if (!wide.matches) side(false); };
$("side").onclick = () => side($("history").hidden);
$("shade").onclick = narrow;
$("history").addEventListener("chosen", () => {
  narrow();
  open("chat");
});
$("history").onkeydown = (event) => {
  if (event.key !== "Escape" || wide.matches) return;
  event.stopPropagation();
  side(false);
  $("side").focus();
};
wide.onchange = () => side(wide.matches && kept.read("side") !== "closed");

function paint(theme) {
  document.documentElement.style.colorScheme = { light: "light", dark: "dark" }[theme] ?? "light dark";
  $("theme-sign").textContent = { light: "○", dark: "●" }[theme] ?? "◐";
  $("theme-name").textContent = { light: "Light", dark: "Dark" }[theme] ?? "Auto";
  $("theme").setAttribute("aria-label", `Theme: ${theme}`);
}
let theme = kept.read("theme") ?? "auto";
$("theme").onclick = () => {
  theme = { light: "dark", dark: "auto" }[theme] ?? "light";
  kept.write("theme", theme);
  paint(theme);
};

// Enter with Command or Control sends a form of several lines.
for (const form of document.querySelectorAll(".tool form")) {
  form.onkeydown = (event) => {
    if (event.key !== "Enter" || !(event.metaKey || event.ctrlKey)) return;
    event.preventDefault();
    form.requestSubmit();
  };
}
$("keyrow").onsubmit = (event) => {
  event.preventDefault();
  document.querySelector("[role=tabpanel]:not([hidden]) form").requestSubmit();
};
$("fresh").onclick = async () => {
  open("chat");
  narrow();
  await begin();
};

paint(theme);
restore();
wide.onchange();
open(TABS.includes(kept.read("tab")) ? kept.read("tab") : "chat");
greet();
resume();
