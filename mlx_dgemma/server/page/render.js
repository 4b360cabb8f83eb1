// Markdown's objects as nodes: only these elements, and text.
import { DIRECTIONS, copyButton, make, oneLine } from "./dom.js";
import { inline, parse, webAddress } from "./markdown.js";

// Code with its controls of writing direction made visible, since they can hide what it does.
function exactly(text) {
  const nodes = [];
  let at = 0;
  for (const { 0: control, index } of text.matchAll(DIRECTIONS)) {
    const name = `U+${control.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
    nodes.push(text.slice(at, index), make("span", "control", name));
    at = index + control.length;
  }
  nodes.push(text.slice(at));
  return nodes.filter((node) => node !== "");
}

function plain(nodes) {
  return nodes.map((node) => typeof node === "string" ? node : node.text ?? plain(node.inside)).join("");
}

function link({ inside, url }) {
  const anchor = make("a", "", make("bdi", "", ...spans(inside)));
  Object.assign(anchor, { href: url.href, rel: "noopener noreferrer", target: "_blank", title: url.href });
  const honest = webAddress(plain(inside))?.href === url.href;
  const told = honest ? [] : [make("bdi", "host", ` (${url.host})`)];  // where it really leads
  return make("span", "", anchor, ...told);
}

function spans(nodes) {
  return nodes.map((node) => {
    if (typeof node === "string") return node;
    if (node.type === "code") return make("code", "", ...exactly(node.text));
    if (node.type === "link") return link(node);
    if (node.type === "picture") return make("span", "picture", "Picture: ", make("bdi", "", ...spans(node.inside)));
    return make(node.type, "", ...spans(node.inside));
  });
}

// A part that may be wider than the page: it scrolls by itself, with keys too.
function scrolling(name, label, inside) {
  const node = make("div", name, inside);
  node.tabIndex = 0;
  node.setAttribute("role", "group");
  node.setAttribute("aria-label", label);
  return node;
}

function code({ label, text, open }) {
  const name = oneLine(label, 30) || "code";
  const inside = make("code", open ? "open" : "", ...exactly(text));
  const head = make("div", "codehead", make("bdi", "", name), copyButton(() => text));
  return make("div", "code", head, scrolling("scroll", `Code: ${name}`, make("pre", "", inside)));
}

function table({ head, align, rows }) {
  const row = (cells, tag) => make("tr", "", ...head.map((_, i) => {
    const cell = make(tag, "", ...spans(inline(cells[i] ?? "")));
    cell.style.textAlign = align[i];
    return cell;
  }));
  const body = rows.map((cells) => row(cells, "td"));
  const inside = make("table", "", make("thead", "", row(head, "th")), make("tbody", "", ...body));
  return scrolling("scroll", "Table", inside);
}

function list({ ordered, start, loose, items }) {
  const lines = items.map((item) => make("li", "", ...item.map(block)));
  const node = make(ordered ? "ol" : "ul", loose ? "" : "tight", ...lines);
  if (ordered) node.start = start;
  return node;
}

function block(one) {
  switch (one.type) {
    case "code": return code(one);
    case "heading": return make(`h${Math.min(6, one.level + 1)}`, `level${one.level}`, ...spans(inline(one.text)));
    case "rule": return make("hr");
    case "quote": return make("blockquote", "", ...one.blocks.map(block));
    case "list": return list(one);
    case "table": return table(one);
    default: return make("p", "", ...spans(inline(one.text)));
  }
}

// Text that grows: blocks that did not change keep their nodes.
export class Rendered {
  constructor() {
    this.node = make("div", "markdown");
    this.sources = [];
    this.made = [];
  }
  show(text) {
    const blocks = parse(text);
    let same = 0;
    while (same < blocks.length && blocks[same].source === this.sources[same]) same++;
    for (const node of this.made.splice(same)) node.remove();
    this.sources = blocks.map(({ source }) => source);
    const made = blocks.slice(same).map(block);
    this.made.push(...made);
    this.node.append(...made);
  }
  // Where text that goes on from `text` continues.
  tail(text) {
    if (/\n[ \t]*\n[ \t]*$/.test(text.slice(-100))) return this.node;
    let at = this.made.at(-1);
    while (at?.lastElementChild && at.matches("ul, ol, li, blockquote, .code, .scroll, pre")) at = at.lastElementChild;
    return at?.matches("p, code.open") ? at : this.node;
  }
}
