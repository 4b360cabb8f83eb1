// The conversation, its composer, and the list of earlier ones.
import { Answer } from "./answer.js";
import { chunks, post, runner, stop } from "./api.js";
import { $, button, download, follow, kept, make, oneLine, tell } from "./dom.js";
import * as history from "./history.js";
import { fields, showSystem } from "./settings.js";

let conversation = history.fresh();
let pictures = [];  // {name, url} that go with the next prompt
let idle = Promise.resolve();  // until the answer that is coming has ended
const live = new Map();  // conversations of this visit by their ids, with their pictures

function picture({ name, url }) {
  if (!url) return make("span", "gone", `${name || "picture"} (not kept)`);
  const image = make("img");
  Object.assign(image, { src: url, alt: name });
  return image;
}

function showPictures() {
  $("pictures").hidden = !pictures.length;
  $("pictures").replaceChildren(...pictures.map((one) => {
    const remove = button("×", () => {
      pictures = pictures.filter((other) => other !== one);
      showPictures();
      $("prompt").focus();
    });
    remove.setAttribute("aria-label", `Remove ${one.name}`);
    return make("li", "", picture(one), remove);
  }));
}

async function addPictures(files) {
  tell("");
  for (const file of files) {
    if (!file.type.startsWith("image/")) {
      tell(`${oneLine(file.name, 80)} is not a picture; add PNG, JPEG, WebP or GIF files.`);
      continue;
    }
    const reader = new FileReader();
    reader.readAsDataURL(file);
    await new Promise((done) => { reader.onloadend = done; });
    if (reader.error) tell(`${oneLine(file.name, 80)} cannot be read.`);
    else pictures.push({ name: oneLine(file.name, 80) || "picture", url: reader.result });
  }
  showPictures();
  $("prompt").focus();
}

function compose(text, shown) {
  $("prompt").value = text;
  pictures = shown.filter(({ url }) => url);
  showPictures();
  grow();
}

export function grow() {
  $("prompt").style.height = "auto";
  $("prompt").style.height = `${$("prompt").scrollHeight}px`;
}

function question({ text, pictures: shown }) {
  const node = make("section", "asked");
  node.setAttribute("aria-label", "You");
  if (shown.length) node.append(make("ul", "pictures", ...shown.map((one) => make("li", "", picture(one)))));
  if (text) node.append(make("p", "", text));
  return node;
}

// The system prompt of the conversation stands above it.
function showHead() {
  $("system-shown").hidden = !conversation.system;
  $("system-text").textContent = conversation.system;
  $("welcome").hidden = conversation.messages.length > 0;
}

function keep() {
  conversation.changed = Date.now();
  conversation.title ||= history.titleOf(conversation.messages);
  live.set(conversation.id, conversation);
  if (!history.save(conversation)) tell("The browser has no room for this conversation: it ends with this visit.");
  showList();
}

// An answer is whole, or as whole as it will be: it alone can be asked for again now.
function end(shown, stats) {
  for (const one of document.querySelectorAll(".again")) one.remove();
  shown.end(stats, again);
  keep();
}

// Asks for the answer to the last message.
async function answer(node, asked, signal) {
  conversation.system = $("system").value.trim();
  const system = conversation.system ? [{ role: "system", content: conversation.system }] : [];
  const messages = [...system, ...conversation.messages.map(history.asMessage)];
  const coming = { role: "assistant", text: "", thought: "", calls: [], finish: "stopped", seed: null, pictures: [] };
  const shown = new Answer(coming);
  shown.begin();
  node.after(shown.node);
  showHead();
  follow(true);
  conversation.messages.push(coming);
  let stats, ended;
  idle = new Promise((done) => { ended = done; });
  try {
    const body = { messages, ...fields(), stream: true, drafts: true, stream_options: { include_usage: true } };
    for await (const chunk of chunks(await post("/v1/chat/completions", body, signal))) {
      if (chunk.draft) shown.canvas.draw(chunk.draft, shown.foot);
      stats = chunk.stats ?? stats;
      for (const choice of chunk.choices ?? []) {
        shown.take(choice.delta ?? {});
        coming.finish = choice.finish_reason ?? coming.finish;
      }
    }
    coming.seed = stats?.seed ?? null;
    end(shown, stats);
  } catch (error) {
    if (shown.started) {  // what is there stays, and the conversation goes on from it
      end(shown, null);
    } else {  // nothing came: the prompt goes back to where it was
      conversation.messages.splice(-2);
      node.remove();
      shown.node.remove();
      if (!$("prompt").value && !pictures.length) compose(asked.text, asked.pictures);
      if (conversation.messages.length) keep();
      else history.remove(conversation.id);
      showHead();
      showList();
    }
    throw error;
  } finally {
    ended();
  }
}

const ask = runner($("ask"), $("go"), async (signal) => {
  const text = $("prompt").value.trim();
  if (!text && !pictures.length) return;
  const asked = { role: "user", text, pictures, thought: "", finish: "", seed: null, calls: [] };
  conversation.messages.push(asked);
  const node = question(asked);
  $("talk").append(node);
  compose("", []);
  keep();
  await answer(node, asked, signal);
});

// Puts the last question back and asks it again.
function again() {
  if (ask.busy) return;
  const asked = conversation.messages.splice(-2)[0];
  for (const node of [...$("talk").querySelectorAll(":scope > .asked, :scope > .answer")].slice(-2)) node.remove();
  compose(asked.text, asked.pictures);
  ask.submit();
}

// Shows another conversation; an answer that is coming stops before.
async function show(next) {
  stop();
  await idle;
  conversation = next;
  tell("");
  for (const node of $("talk").querySelectorAll(":scope > .asked, :scope > .answer")) node.remove();
  const { messages } = conversation;
  if (messages.at(-1)?.role === "user") {  // its answer never came
    const asked = messages.pop();
    compose(asked.text, asked.pictures);
  }
  for (const [i, message] of messages.entries()) {
    if (message.role === "user") $("talk").append(question(message));
    else {
      const shown = new Answer(message);
      $("talk").append(shown.node);
      shown.end(null, i === messages.length - 1 ? again : null);
    }
  }
  if (conversation.changed) showSystem(conversation.system);
  showHead();
  showList();
  follow(true);
}

export async function begin() {
  await show(history.fresh());
  $("prompt").focus();
}

// Opens the newest conversation of an earlier visit, if there is one.
export async function resume() {
  const [newest] = history.all();
  if (newest) await show(newest);
  else showList();
}

function rename(one, item) {
  const field = make("input");
  Object.assign(field, { value: one.title, maxLength: 60 });
  field.setAttribute("aria-label", "Title");
  const done = (take) => {
    field.onblur = null;
    const fresh = live.get(one.id) ?? history.load(one.id);
    if (take && fresh) {
      fresh.title = oneLine(field.value, 60) || history.titleOf(fresh.messages);
      history.save(fresh);
    }
    showList();
    [...$("conversations").children].find(({ id }) => id === item.id)?.firstChild.focus();
  };
  field.onkeydown = (event) => {
    if (event.key !== "Enter" && event.key !== "Escape") return;
    event.preventDefault();
    event.stopPropagation();
    done(event.key === "Enter");
  };
  field.onblur = () => done(true);
  item.replaceChildren(field);
  field.select();
}

async function forget(one) {
  const gone = live.get(one.id) ?? one;
  const current = gone.id === conversation.id;
  if (current) await begin();
  live.delete(one.id);
  history.remove(one.id);
  showList();
  tell(`“${one.title}” is deleted. `, button("Undo", async () => {
    tell("");
    history.save(gone);
    if (current) await show(gone);
    showList();
  }));
}

export function showList() {
  const found = history.keeping() ? history.all() : [...live.values()].sort((a, b) => b.changed - a.changed);
  $("conversations").replaceChildren(...found.map((one) => {
    const item = make("li");
    item.id = `kept-${one.id}`;
    const open = button(one.title, () => {
      show(live.get(one.id) ?? history.load(one.id) ?? history.fresh());
      $("history").dispatchEvent(new Event("chosen"));
    });
    open.className = "title";
    open.dir = "auto";
    if (one.id === conversation.id) open.setAttribute("aria-current", "true");
    const change = button("✎", () => rename(one, item), "Rename"), remove = button("×", () => forget(one), "Delete");
    change.setAttribute("aria-label", `Rename ${one.title}`);
    remove.setAttribute("aria-label", `Delete ${one.title}`);
    item.append(open, change, remove);
    return item;
  }));
  $("none").hidden = found.length > 0;
  $("as-markdown").disabled = $("as-json").disabled = !conversation.messages.length;
}

$("as-markdown").onclick = () => download("conversation.md", "text/markdown", history.asMarkdown(conversation));
$("as-json").onclick = () => download("conversation.json", "application/json", history.asJson(conversation));
$("keep").checked = history.keeping();
$("keep").onchange = () => {
  kept.write("keep", $("keep").checked ? "yes" : "no");
  if ($("keep").checked) for (const one of live.values()) history.save(one);
  else {
    for (const one of history.all()) if (!live.has(one.id)) live.set(one.id, one);
    history.removeAll();
    tell("Conversations end with this visit now. ", button("Undo", () => {
      tell("");
      $("keep").click();
    }));
  }
  showList();
};
addEventListener("storage", showList);  // another window changed them
addEventListener("pagehide", () => { if (ask.busy && conversation.messages.length) history.save(conversation); });

$("ask").onkeydown = (event) => {
  const composing = event.isComposing || event.keyCode === 229;  // Enter takes a suggestion of an input method
  if (event.key !== "Enter" || event.shiftKey || composing || !event.target.matches("textarea, input")) return;
  event.preventDefault();
  if (!ask.busy) ask.submit();
};
$("prompt").oninput = grow;
$("prompt").onpaste = (event) => {
  if (!event.clipboardData.files.length) return;
  event.preventDefault();
  addPictures(event.clipboardData.files);
};
$("attach").onclick = () => $("files").click();
$("files").onchange = async () => {
  await addPictures($("files").files);
  $("files").value = "";  // the same file can be chosen again
};
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dropping");
});
addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
addEventListener("drop", (event) => {
  document.body.classList.remove("dropping");
  event.preventDefault();
  if (!$("chat").hidden) addPictures(event.dataTransfer.files);
});
for (const example of document.querySelectorAll("#welcome li button")) {
  example.onclick = () => {
    compose(example.textContent, pictures);
    $("prompt").focus();
  };
}
