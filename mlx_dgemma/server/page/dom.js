// Nodes, the notice, the clipboard, and what the browser keeps. Strings become text, never markup.

export const $ = (id) => document.getElementById(id);
export const count = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;

export function make(tag, name, ...inside) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...inside);
  return node;
}

export function button(text, act, title = "") {
  const made = make("button", "", text);
  Object.assign(made, { type: "button", title, onclick: act });
  return made;
}

// A button that copies what `read` returns; nothing where the browser has no clipboard (plain http of another host).
export function copyButton(read, name = "Copy") {
  if (!navigator.clipboard) return "";
  const made = button(name, async () => {
    await navigator.clipboard.writeText(read()).then(
      () => { made.textContent = "Copied"; },
      () => { made.textContent = "Not allowed"; },
    );
    setTimeout(() => { made.textContent = name; }, 1500);
  });
  return made;
}

// Text for a screen reader, which colours and lines do not reach.
export const unseen = (text) => make("span", "unseen", text);

// The notice above everything: a problem, or what was done, with buttons.
export function tell(problem, ...buttons) {
  $("error").classList.toggle("plain", buttons.length > 0);
  $("error").replaceChildren(problem, ...buttons);
}

// Controls of writing direction can make a text look like another one.
export const DIRECTIONS = /[\u200e\u200f\u061c\u202a-\u202e\u2066-\u2069]/g;
const CONTROLS = /[\u0000-\u001f\u007f-\u009f\u2028\u2029]+/g;

// A text as one short line.
export function oneLine(text, most) {
  const line = text.slice(0, 4 * most).replace(DIRECTIONS, "").replace(CONTROLS, " ").trim();
  const characters = [...line];
  return characters.length > most ? `${characters.slice(0, most - 1).join("")}…` : line;
}

// What the browser keeps between visits. It may keep nothing: then reading gives null, and writing false.
export const kept = {
  read(name) {
    try { return localStorage.getItem(name); } catch { return null; }
  },
  write(name, value) {
    try { localStorage.setItem(name, value); return true; } catch { return false; }
  },
  remove(name) {
    try { localStorage.removeItem(name); } catch { /* nothing was kept */ }
  },
  names() {
    try { return Object.keys(localStorage); } catch { return []; }
  },
};

// The page stays at its end while answers grow, unless the reader has scrolled away from there.
const page = document.documentElement;
let following = true;
addEventListener("scroll", () => { following = page.scrollHeight - innerHeight - scrollY < 60; }, { passive: true });

export function follow(again = false) {
  following ||= again;
  if (following) scrollTo(0, page.scrollHeight);
}

// Offers a text as a file.
export function download(name, type, text) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}
