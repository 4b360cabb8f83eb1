// An answer on the page: finished text behind which a canvas settles.
import { $, copyButton, button, count, follow, make } from "./dom.js";
import { Rendered } from "./render.js";

// A canvas redraws at most once a frame, and only those of its tokens that changed.
export class Canvas {
  constructor() {
    this.node = make("span", "canvas");
    this.node.setAttribute("aria-hidden", "true");
    this.next = null;
  }
  draw(draft, foot) {
    if (!this.next) requestAnimationFrame(() => this.render(foot));
    this.next = draft;
  }
  render(foot) {
    if (!this.next) return;  // its block is finished
    const { tokens, block, step } = this.next;
    this.next = null;
    tokens.forEach(({ text, confidence }, i) => {
      const span = this.node.children[i] ?? this.node.appendChild(make("span"));
      if (span.textContent !== text) span.textContent = text;
      span.style.setProperty("--sure", Number(confidence).toFixed(2));
    });
    while (this.node.children.length > tokens.length) this.node.lastChild.remove();
    foot.textContent = `Block ${block + 1}, step ${step}`;
    follow();
  }
  clear() {
    this.next = null;
    this.node.replaceChildren();
  }
}

// Tells a screen reader finished text, in whole sentences where it comes by the word.
class Voice {
  constructor() {
    this.rest = "";
    $("heard").replaceChildren();
  }
  add(piece) {
    this.rest += piece;
    const end = Math.max(this.rest.lastIndexOf("\n"), ...[". ", "! ", "? "].map((one) => this.rest.lastIndexOf(one)));
    if (end >= 0) this.say(end + 1);
  }
  say(end = this.rest.length) {
    if (end) $("heard").append(make("div", "", this.rest.slice(0, end)));
    this.rest = this.rest.slice(end);
  }
}

// The line below an answer: what it cost, and its seed.
export function statistics(stats) {
  if (!stats) return [];
  const parts = [count(stats.generated_tokens, "token"), count(stats.denoising_steps, "step")];
  parts.push(`${stats.seconds.total.toFixed(2)} s`, `${stats.tokens_per_second.toFixed(1)} tokens/s`);
  const { reused_tokens: cached, prompt_tokens: asked } = stats;
  if (cached) parts.push(`${cached} of ${count(asked, "prompt token")} cached`);
  return parts;
}

export function seedButton(seed) {
  if (seed === null || seed === undefined) return [];
  const keep = () => {
    $("seed").value = seed;
    $("seed").dispatchEvent(new Event("input", { bubbles: true }));
  };
  return [button(`seed ${seed}`, keep, "Use this seed again")];
}

export class Answer {
  // The message is filled while the answer comes.
  constructor(message) {
    this.message = message;
    this.canvas = new Canvas();
    this.said = new Rendered();
    this.thought = make("p");
    this.details = make("details", "thought", make("summary", "", "Thinking"), this.thought);
    this.details.hidden = true;
    this.foot = make("div", "foot");
    this.node = make("article", "answer", this.details, this.said.node, this.foot);
    this.node.setAttribute("aria-label", "Answer");
    this.frame = 0;
  }
  begin() {
    this.voice = new Voice();
    this.node.setAttribute("aria-busy", "true");
    this.foot.setAttribute("aria-hidden", "true");
    this.said.node.append(this.canvas.node);
  }
  take({ content, reasoning_content: thought, tool_calls: calls }) {
    if (!content && !thought && !calls) return;
    this.canvas.clear();
    if (thought) {
      this.message.thought += thought;
      this.details.hidden = false;
      this.thought.append(thought);
    }
    if (content) {
      this.message.text += content;
      this.voice.add(content);
      this.frame ||= requestAnimationFrame(() => this.show());
    }
    for (const call of calls ?? []) {
      this.message.calls.push(call);
      this.foot.before(make("pre", "call", `${call.function.name}(${call.function.arguments})`));
    }
    follow();
  }
  show() {
    this.frame = 0;
    this.said.show(this.message.text);
    if (this.node.hasAttribute("aria-busy")) this.said.tail(this.message.text).append(this.canvas.node);
    follow();
  }
  get started() {
    const { text, thought, calls } = this.message;
    return Boolean(text || thought || calls.length);
  }
  // The whole message, with what is known about its end.
  end(stats, retry) {
    this.node.removeAttribute("aria-busy");
    this.canvas.clear();
    this.canvas.node.remove();
    this.show();
    this.voice?.say();
    const { text, thought, calls, finish, seed } = this.message;
    this.details.hidden = !thought;
    this.thought.textContent = thought;
    this.said.node.hidden = !text;
    this.foot.removeAttribute("aria-hidden");
    const parts = [];
    if (finish === "length") parts.push("Cut at the maximum of tokens");
    if (finish === "stopped") parts.push("Stopped");
    else if (!text && !calls.length) parts.push("No text came");
    this.foot.replaceChildren(...[...parts, ...statistics(stats)].map((part) => make("span", "", part)));
    this.foot.append(...seedButton(seed), text ? copyButton(() => text) : "");
    if (retry) {
      const again = button("Again", retry, "Another answer to the same prompt");
      again.className = "again";
      this.foot.append(again);
    }
    follow();
  }
}
