// What an edit changed, in words.
import { count, make, unseen } from "./dom.js";

const WORDS = /\s+|[\p{L}\p{M}\p{N}_]+|[^\s\p{L}\p{M}\p{N}_]/gu;
const MOST = 800;  // words that come and go; beyond them the middle is one change

// The shortest edit script of two lists by Myers' algorithm: [[kind, word], ...] with kind -1 out, 0 stays, 1 in.
function script(old, fresh) {
  const furthest = new Map([[1, 0]]), trace = [];
  const most = Math.min(old.length + fresh.length, MOST);
  for (let changes = 0; changes <= most; changes++) {
    trace.push(new Map(furthest));
    for (let k = -changes; k <= changes; k += 2) {
      const down = k === -changes || (k !== changes && furthest.get(k - 1) < furthest.get(k + 1));
      let x = down ? furthest.get(k + 1) : furthest.get(k - 1) + 1;
      while (x < old.length && x - k < fresh.length && old[x] === fresh[x - k]) x++;
      furthest.set(k, x);
      if (x >= old.length && x - k >= fresh.length) return backwards(old, fresh, trace);
    }
  }
  return [...old.map((word) => [-1, word]), ...fresh.map((word) => [1, word])];
}

function backwards(old, fresh, trace) {
  const found = [];
  let x = old.length, y = fresh.length;
  for (let changes = trace.length - 1; changes >= 0; changes--) {
    const furthest = trace[changes], k = x - y;
    const down = k === -changes || (k !== changes && furthest.get(k - 1) < furthest.get(k + 1));
    const before = down ? k + 1 : k - 1, left = furthest.get(before) ?? 0;
    while (x > left && y > left - before && x > 0 && y > 0) found.push([0, old[(y--, --x)]]);
    if (changes > 0) found.push(down ? [1, fresh[--y]] : [-1, old[--x]]);
  }
  return found.reverse();
}

// The parts of a change as [[kind, text], ...], neighbours joined: what goes stands before what comes.
export function changes(from, to) {
  const old = from.match(WORDS) ?? [], fresh = to.match(WORDS) ?? [];
  let head = 0, tail = 0;
  while (head < Math.min(old.length, fresh.length) && old[head] === fresh[head]) head++;
  const rest = Math.min(old.length, fresh.length) - head;
  while (tail < rest && old.at(-1 - tail) === fresh.at(-1 - tail)) tail++;
  const middle = script(old.slice(head, old.length - tail), fresh.slice(head, fresh.length - tail));
  const all = [[0, old.slice(0, head).join("")], ...middle, [0, old.slice(old.length - tail).join("")]];
  const parts = [];
  let out = "", coming = "";
  const close = () => {
    if (out) parts.push([-1, out]);
    if (coming) parts.push([1, coming]);
    out = coming = "";
  };
  for (const [i, [kind, text]] of all.entries()) {
    if (kind < 0) out += text;
    else if (kind > 0) coming += text;
    else if (text.trim() === "" && text && (out || coming) && all[i + 1]?.[0]) {  // a blank between changes joins them
      out += text;
      coming += text;
    } else if (text) {
      close();
      const last = parts.at(-1);
      if (last?.[0] === 0) last[1] += text;
      else parts.push([0, text]);
    }
  }
  close();
  return parts;
}

// Both texts in one: what goes is struck through, what comes is underlined.
export function changed(from, to) {
  const parts = changes(from, to), words = (text) => (text.match(/\S+/g) ?? []).length;
  const number = (kind) => parts.reduce((sum, [one, text]) => sum + (one === kind ? words(text) : 0), 0);
  const nodes = parts.map(([kind, text]) => {
    if (!kind) return text;
    return make(kind < 0 ? "del" : "ins", "", unseen(kind < 0 ? "[out: " : "[in: "), text, unseen("]"));
  });
  const summary = parts.every(([kind]) => kind === 0) ? "Nothing changed" :
    `${count(number(-1), "word")} out, ${count(number(1), "word")} in`;
  return [nodes, summary];
}
