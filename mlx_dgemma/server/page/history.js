// Conversations that the browser keeps: one entry each, so that two windows do not overwrite one another.
import { kept, oneLine } from "./dom.js";

const PREFIX = "conversation.";
const MOST = 50;  // conversations
const CHARACTERS = 2_000_000;  // of all together; browsers keep about five million
const TITLE = 60;

const text = (value) => typeof value === "string" ? value : "";
const list = (value) => Array.isArray(value) ? value : [];

export function fresh() {
  const random = crypto.getRandomValues(new Uint32Array(2));
  return { id: `${Date.now().toString(36)}-${random[0].toString(36)}${random[1].toString(36)}`, title: "", changed: 0,
    system: "", messages: [] };
}

// A conversation of exactly these fields, whatever the entry holds; null where it is none.
function read(id, entry) {
  let found;
  try { found = JSON.parse(entry); } catch { return null; }
  if (!Array.isArray(found?.messages)) return null;
  const messages = found.messages.filter((one) => one?.role === "user" || one?.role === "assistant").map((one) => ({
    role: one.role, text: text(one.text), thought: text(one.thought), finish: text(one.finish),
    seed: Number.isSafeInteger(one.seed) ? one.seed : null,
    calls: [],
    pictures: list(one.pictures).map((picture) => ({ name: text(picture?.name), url: "" })),
  }));
  const last = messages.at(-1);
  if (last?.role === "assistant" && !last.text && !last.thought) messages.pop();  // the visit ended before it began
  if (!messages.length) return null;
  const title = oneLine(text(found.title), TITLE) || titleOf(messages);
  return { id, title, changed: Number(found.changed) || 0, system: text(found.system), messages };
}

function entries() {
  const found = [];
  for (const name of kept.names()) {
    if (!name.startsWith(PREFIX)) continue;
    const entry = kept.read(name) ?? "", conversation = read(name.slice(PREFIX.length), entry);
    if (conversation) found.push({ conversation, size: entry.length });
  }
  return found.sort((a, b) => b.conversation.changed - a.conversation.changed);
}

export function titleOf(messages) {
  const first = messages.find(({ role }) => role === "user");
  return oneLine(first?.text ?? "", TITLE) || (first?.pictures.length ? "A picture" : "Conversation");
}

// All conversations, the newest first.
export const all = () => entries().map(({ conversation }) => conversation);
export const load = (id) => read(id, kept.read(PREFIX + id));
export const remove = (id) => kept.remove(PREFIX + id);

// Removes all that is kept, what cannot be read too.
export function removeAll() {
  for (const name of kept.names()) if (name.startsWith(PREFIX)) kept.remove(name);
}

export function keeping() {
  return kept.read("keep") !== "no";
}

// Keeps a conversation without its pictures, and drops the oldest beyond the bounds; returns whether it is kept.
export function save(conversation) {
  if (!keeping() || !conversation.messages.length) return true;
  const { id, title, changed, system } = conversation;
  const messages = conversation.messages.map(({ role, text, thought, finish, seed, pictures }) => (
    { role, text, thought, finish, seed, pictures: pictures.map(({ name }) => ({ name })) }));
  const entry = JSON.stringify({ title, changed, system, messages });
  if (entry.length > CHARACTERS) return false;
  const others = entries().filter((one) => one.conversation.id !== id);
  let size = others.reduce((sum, one) => sum + one.size, entry.length);
  const dropOldest = () => {
    const oldest = others.pop();
    size -= oldest.size;
    remove(oldest.conversation.id);
  };
  while (others.length >= MOST || size > CHARACTERS) dropOldest();
  while (!kept.write(PREFIX + id, entry)) {
    if (!others.length) return false;
    dropOldest();
  }
  return true;
}

export function asMarkdown({ title, system, messages }) {
  const parts = [`# ${title}`];
  if (system) parts.push("## System", system);
  for (const { role, text, pictures } of messages) {
    parts.push(role === "user" ? "## You" : "## Answer", ...pictures.map(({ name }) => `(picture: ${name})`), text);
  }
  return `${parts.filter(Boolean).join("\n\n")}\n`;
}

export function asJson({ title, system, messages }) {
  const first = system ? [{ role: "system", content: system }] : [];
  return `${JSON.stringify({ title, messages: [...first, ...messages.map(asMessage)] }, null, 2)}\n`;
}

// A message as the server takes it. Of a picture that is no longer here its name remains.
export function asMessage({ role, text, pictures, calls }) {
  if (role === "assistant") return calls.length ? { role, content: text, tool_calls: calls } : { role, content: text };
  const gone = pictures.filter(({ url }) => !url).map(({ name }) => `(picture: ${name})`);
  const whole = [...gone, text].filter(Boolean).join("\n");
  const shown = pictures.filter(({ url }) => url).map(({ url }) => ({ type: "image_url", image_url: { url } }));
  if (!shown.length) return { role, content: whole };
  return { role, content: whole ? [...shown, { type: "text", text: whole }] : shown };
}
