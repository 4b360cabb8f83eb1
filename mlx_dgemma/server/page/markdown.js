// Markdown as plain objects. Every function takes linear time: what is nested more deeply than a bound stays text.

const DEEPEST = 8;  // lists and quotes inside one another
const MARKS = 32;  // emphases and brackets inside one another
const COLUMNS = 32;  // of a table
const ADDRESS = 2000;  // characters of a link's address

const FENCE = /^ {0,3}(`{3,}(?=[^`]*$)|~{3,})/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const MARKER = /^( {0,3})([-*+]|\d{1,9}[.)])([ \t]+|$)/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const blank = (line) => line.trim() === "";

function width(line) {
  let columns = 0;
  for (const character of line) {
    if (character === " ") columns += 1;
    else if (character === "\t") columns += 4 - columns % 4;
    else break;
  }
  return columns;
}

// The line without up to so many columns of white space.
function strip(line, most) {
  let columns = 0, i = 0;
  for (; columns < most && (line[i] === " " || line[i] === "\t"); i++) {
    columns += line[i] === "\t" ? 4 - columns % 4 : 1;
  }
  return " ".repeat(Math.max(0, columns - most)) + line.slice(i);
}

function marker(line) {
  const found = RULE.test(line) ? null : MARKER.exec(line);
  if (!found) return null;
  const [whole, indent, sign, space] = found;
  const wide = space.length > 4 ? 1 : space.length || 1;
  return {
    kind: sign.at(-1), start: parseInt(sign, 10), indent: indent.length, content: indent.length + sign.length + wide,
    rest: space.length > 4 ? space.slice(1) + line.slice(whole.length) : line.slice(whole.length),
  };
}

// Whether a line ends the paragraph before it.
function begins(line) {
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const list = marker(line);
  return Boolean(list) && list.rest !== "" && !(list.start > 1);
}

function cells(line) {
  const found = [];
  let cell = "";
  for (let i = 0; i < line.length; i++) {
    if (line[i] === "\\" && line[i + 1] === "|") { cell += "|"; i++; }
    else if (line[i] === "|") { found.push(cell.trim()); cell = ""; }
    else cell += line[i];
  }
  found.push(cell.trim());
  if (found[0] === "") found.shift();
  if (found.at(-1) === "") found.pop();
  return found;
}

const DASHES = /^:?-+:?$/;
function isTable(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !lines[at + 1].includes("-")) return false;
  const below = cells(lines[at + 1]);
  return below.length > 0 && below.length <= COLUMNS && below.every((cell) => DASHES.test(cell)) &&
    cells(lines[at]).length === below.length;
}

// Each reader returns a block and the number of the line behind it, or null.

function readFence(lines, at) {
  const fence = FENCE.exec(lines[at])?.[1];
  if (!fence) return null;
  const indent = width(lines[at]), label = lines[at].trim().slice(fence.length).trim().split(/[\s{,]/, 1)[0];
  let end = at + 1;
  const closes = (line) => line.startsWith(fence) && blank(line.replaceAll(fence[0], ""));
  while (end < lines.length && !(width(lines[end]) < 4 && closes(lines[end].trim()))) end++;
  const text = lines.slice(at + 1, end).map((line) => strip(line, indent)).join("\n");
  return [{ type: "code", label, text, open: end >= lines.length }, end + 1];
}

function readHeading(lines, at) {
  const level = HEADING.exec(lines[at])?.[1].length;
  if (!level) return null;
  let text = lines[at].trim().slice(level).trim();
  let end = text.length;
  while (text[end - 1] === "#") end--;
  if (end === 0 || text[end - 1] === " ") text = text.slice(0, end).trim();
  return [{ type: "heading", level, text }, at + 1];
}

function readRule(lines, at) {
  return RULE.test(lines[at]) ? [{ type: "rule" }, at + 1] : null;
}

function readQuote(lines, at, depth) {
  if (depth >= DEEPEST || !QUOTE.test(lines[at])) return null;
  const inner = [];
  let end = at;
  for (; end < lines.length && QUOTE.test(lines[end]); end++) inner.push(lines[end].replace(QUOTE, ""));
  return [{ type: "quote", blocks: blocksOf(inner, depth + 1) }, end];
}

// The lines of a list's item, and the number of the line behind them.
function readItem(lines, at, here) {
  const inner = [here.rest];
  let end = at + 1, fence = FENCE.exec(here.rest)?.[1] ?? "", empty = false;
  for (; end < lines.length; end++) {
    const line = lines[end];
    if (blank(line)) {
      inner.push("");
      empty = true;
      continue;
    }
    const inside = width(line) >= Math.min(here.content, here.indent + 2);  // models often indent by two
    if (!inside && (empty || fence || begins(line) || marker(line))) break;
    const cut = inside ? strip(line, here.content) : line;
    if (fence && cut.trim().startsWith(fence) && blank(cut.replaceAll(fence[0], ""))) fence = "";
    else if (!fence) fence = FENCE.exec(cut)?.[1] ?? "";
    inner.push(cut);
    empty = false;
  }
  let gap = false;
  for (; inner.length > 1 && inner.at(-1) === ""; gap = true) inner.pop();
  return [inner, end, gap];
}

function readList(lines, at, depth) {
  const first = depth < DEEPEST && marker(lines[at]);
  if (!first) return null;
  const items = [];
  let end = at, loose = false, apart = false;
  for (let here = first; here?.kind === first.kind; here = end < lines.length ? marker(lines[end]) : null) {
    loose ||= apart;
    const [inner, next, gap] = readItem(lines, end, here);
    loose ||= inner.includes("");
    apart = gap;
    const task = /^\[([ xX])\] /.exec(inner[0]);
    if (task) inner[0] = `${task[1] === " " ? "☐" : "☑"} ${inner[0].slice(4)}`;
    items.push(blocksOf(inner, depth + 1));
    end = next;
  }
  return [{ type: "list", ordered: first.start >= 0, start: first.start, loose, items }, end];
}

function readTable(lines, at) {
  if (!isTable(lines, at)) return null;
  const head = cells(lines[at]), below = cells(lines[at + 1]), rows = [];
  const align = below.map((cell) => cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : "start");
  let end = at + 2;
  for (; end < lines.length && lines[end].includes("|") && !blank(lines[end]); end++) {
    rows.push(cells(lines[end]).slice(0, head.length));
  }
  return [{ type: "table", head, align, rows }, end];
}

function readParagraph(lines, at) {
  let end = at + 1;
  while (end < lines.length && !blank(lines[end]) && !begins(lines[end]) && !isTable(lines, end)) end++;
  return [{ type: "paragraph", text: lines.slice(at, end).join("\n").trimEnd() }, end];
}

function blocksOf(lines, depth) {
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const [block, end] = readFence(lines, at) ?? readHeading(lines, at) ?? readRule(lines, at) ??
      readQuote(lines, at, depth) ?? readList(lines, at, depth) ?? readTable(lines, at) ?? readParagraph(lines, at);
    if (depth === 0) block.source = lines.slice(at, end).join("\n");
    blocks.push(block);
    at = end;
  }
  return blocks;
}

// The blocks of a text; those at the top have their `source`.
export const parse = (text) => blocksOf(text.split(/\r\n|\r|\n/), 0);

// The address of a page on the web, or null. No name or password, which make one host look like another.
export function webAddress(text) {
  if (!/^https?:\/\//i.test(text)) return null;
  try {
    const url = new URL(text);
    return url.hostname && !url.username && !url.password ? url : null;
  } catch {
    return null;
  }
}

const SPECIAL = /[\\`*_~[\]<]|!\[|https?:\/\/|&(?:lt|gt|amp|quot|nbsp|#39);/g;
const ENTITIES = new Map([
  ["&lt;", "<"], ["&gt;", ">"], ["&amp;", "&"], ["&quot;", '"'], ["&nbsp;", "\u00a0"], ["&#39;", "'"],
]);
const BARE = /https?:\/\/[^\s<>`"\]|]{1,2000}/y;
const ANGLED = /<(https?:\/\/[^\s<>]{1,2000})>/y;
const BREAK = /<br ?\/?>/iy;
const PUNCTUATION = /[\p{P}\p{S}]/u;

function matchAt(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text);
}

// Positions of the runs of backticks, by their length.
function backticks(text) {
  const runs = new Map();
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  for (const positions of runs.values()) positions.reverse();  // the next one is the last
  return runs;
}

// The "(address "title")" of a link at `at`: [address, the position behind it], or null.
function destination(text, at) {
  let i = at + 1, parentheses = 0;
  for (; i < text.length && i - at < ADDRESS && !/\s/.test(text[i]); i++) {
    if (text[i] === "(" && ++parentheses > 4) return null;
    if (text[i] === ")" && --parentheses < 0) break;
  }
  const address = text.slice(at + 1, i);
  const title = matchAt(/[ \t]+(?:"[^"\n]{0,300}"|'[^'\n]{0,300}')(?=\))/y, text, i);
  if (title) i += title[0].length;
  return text[i] === ")" ? [address.replace(/^<(.*)>$/, "$1"), i + 1] : null;
}

class Inline {
  constructor(text) {
    this.text = text;
    this.stack = [{ mark: "", count: 0, inside: [] }];
    this.open = new Map();  // number of open frames by their mark
    this.runs = backticks(text);
  }
  get top() { return this.stack.at(-1); }
  add(node) {
    const { inside } = this.top;
    if (typeof node === "string" && typeof inside.at(-1) === "string") inside[inside.length - 1] += node;
    else if (node !== "") inside.push(node);
  }
  push(mark, count) {
    if (this.stack.length >= MARKS) return this.add(mark.repeat(count));
    this.stack.push({ mark, count, inside: [] });
    this.open.set(mark, (this.open.get(mark) ?? 0) + 1);
  }
  pop() {
    const frame = this.stack.pop();
    this.open.set(frame.mark, this.open.get(frame.mark) - 1);
    return frame;
  }
  // The top frame has no partner: its mark is text.
  dissolve() {
    const { mark, count, inside } = this.pop();
    this.add(mark.repeat(count));
    for (const node of inside) this.add(node);
  }
  emphasis(at) {
    const { text } = this, mark = text[at];
    let end = at;
    while (text[end] === mark) end++;
    let count = end - at;
    if (mark === "~" ? count !== 2 : count > 6) {
      this.add(mark.repeat(count));
      return end;
    }
    const before = text[at - 1] ?? " ", after = text[end] ?? " ";
    const [spaceBefore, spaceAfter] = [before, after].map((one) => one.trim() === "");
    const [signBefore, signAfter] = [before, after].map((one) => PUNCTUATION.test(one));
    const word = mark === "_";  // inside words it is a letter; a star may stand anywhere, as models put it
    const opens = !spaceAfter && (!word || spaceBefore || signBefore);
    const closes = !spaceBefore && (!word || spaceAfter || signAfter);
    while (count && closes && this.open.get(mark)) {
      while (this.top.mark !== mark) this.dissolve();
      const frame = this.top, used = Math.min(frame.count, count) >= 2 ? 2 : 1;
      frame.inside = [{ type: mark === "~" ? "del" : used === 2 ? "strong" : "em", inside: frame.inside }];
      frame.count -= used;
      count -= used;
      if (!frame.count) for (const node of this.pop().inside) this.add(node);
    }
    if (count && opens) this.push(mark, count);
    else this.add(mark.repeat(count));
    return end;
  }
  code(at) {
    let end = at;
    while (this.text[end] === "`") end++;
    const closings = this.runs.get(end - at);
    while (closings.length && closings.at(-1) <= at) closings.pop();
    if (!closings.length) {
      this.add(this.text.slice(at, end));
      return end;
    }
    let inside = this.text.slice(end, closings.at(-1)).replaceAll("\n", " ");
    if (inside.startsWith(" ") && inside.endsWith(" ") && !blank(inside)) inside = inside.slice(1, -1);
    this.add({ type: "code", text: inside });
    return closings.at(-1) + end - at;
  }
  close(at) {
    const found = this.stack.findLastIndex(({ mark }) => mark === "[" || mark === "![");
    if (found < 0) {
      this.add("]");
      return at + 1;
    }
    const target = this.text[at + 1] === "(" ? destination(this.text, at + 1) : null;
    const frame = this.stack[found], url = target && webAddress(target[0]);
    while (this.stack.length > found + 1) this.dissolve();
    if (!target || (frame.mark === "[" && (!url || frame.dead))) {
      this.dissolve();
      this.add("]");
      return at + 1;
    }
    this.pop();
    this.add({ type: frame.mark === "[" ? "link" : "picture", inside: frame.inside, url });
    if (frame.mark === "[") for (const one of this.stack) one.dead = one.mark === "[";  // no link inside a link
    return target[1];
  }
  address(at) {
    const angled = this.text[at] === "<" && matchAt(ANGLED, this.text, at);
    let address = angled ? angled[1] : matchAt(BARE, this.text, at)?.[0] ?? "";
    if (!angled) {
      let end = address.length;
      const loose = address.includes("(") ? ".,;:!?*_~'" : ".,;:!?*_~')";
      while (end && loose.includes(address[end - 1])) end--;
      address = address.slice(0, end);
    }
    const url = /\w/.test(this.text[at - 1] ?? "") || this.open.get("[") ? null : webAddress(address);
    if (!address) return 0;
    this.add(url ? { type: "link", inside: [address], url } : address);
    return at + (angled ? angled[0].length : address.length);
  }
  // Reads what begins at `at`; returns the position behind it.
  special(at, sign) {
    const { text } = this;
    if (sign === "`") return this.code(at);
    if (sign === "*" || sign === "_" || sign === "~") return this.emphasis(at);
    if (sign === "]") return this.close(at);
    if (sign === "[" || sign === "![") {
      this.push(sign, 1);
      return at + sign.length;
    }
    if (sign === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
      this.add(text[at + 1]);
      return at + 2;
    }
    const line = sign === "<" && matchAt(BREAK, text, at);
    if (line) this.add("\n");
    const end = line ? at + line[0].length : (sign === "<" || sign[0] === "h") && this.address(at);
    if (end) return end;
    this.add(ENTITIES.get(sign) ?? sign);
    return at + sign.length;
  }
  read() {
    for (let at = 0; ;) {
      const found = matchAt(SPECIAL, this.text, at);
      this.add(this.text.slice(at, found?.index));
      if (!found) break;
      at = this.special(found.index, found[0]);
    }
    while (this.stack.length > 1) this.dissolve();
    return this.top.inside;
  }
}

// The strings and nodes {type, inside, text, url} of a text: code, em, strong, del, link, picture.
export const inline = (text) => new Inline(text).read();
