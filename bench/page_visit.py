"""What bench/page.py and its parts share: checks, a page in a browser, answers that stand in for a model's."""

import base64
import json
import urllib.error
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, Route

PHONE, DESK = {"width": 360, "height": 740}, {"width": 1100, "height": 780}
# The demo is faster than a screenshot: reads of the stream wait so many ms. Whatever runs from an answer is noted.
PREPARE = """() => {
  const read = ReadableStreamDefaultReader.prototype.read;
  window.pace = 0;
  ReadableStreamDefaultReader.prototype.read = async function () {
    if (window.pace) await new Promise((done) => setTimeout(done, window.pace));
    return read.call(this);
  };
  window.ran = [];
  for (const name of ["alert", "confirm", "prompt", "print", "open"]) {
    window[name] = (what) => window.ran.push(`${name} ${what}`);
  }
}"""
SET = """([id, value]) => {
  const field = document.getElementById(id);
  field.value = value;
  field.dispatchEvent(new Event("input", { bubbles: true }));
}"""
GIVE = """([way, name, kind, data]) => {
  const bytes = Uint8Array.from(atob(data), (char) => char.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], name, { type: kind }));
  const how = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
  if (way === "paste") return document.querySelector("#prompt").dispatchEvent(new ClipboardEvent("paste", how));
  for (const type of ["dragover", "drop"]) document.body.dispatchEvent(new DragEvent(type, how));
}"""
INSIDE = """[...document.querySelectorAll("button, input, select, textarea, summary")].filter((one) => {
  const box = one.getBoundingClientRect();
  return box.width > 1 && !one.closest(".scroll") && (box.left < 0 || box.right > innerWidth);
}).map((one) => one.id || one.textContent)"""
STATS = {
    "generated_tokens": 20,
    "denoising_steps": 4,
    "seconds": {"total": 0.3},
    "tokens_per_second": 66.0,
    "reused_tokens": 0,
    "prompt_tokens": 10,
    "seed": 7,
}
FAILED: list[str] = []


def check(what: str, holds: bool, told: object = "") -> None:
    print(f"{'ok    ' if holds else 'FAILED'} {what}{f': {told}' if told or not holds else ''}", flush=True)
    if not holds:
        FAILED.append(what)


def user(content: object) -> dict:
    return {"role": "user", "content": content}


def stream(*events: dict) -> str:
    """The body of a stream of server-sent events."""
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def answer_events(text: str, thought: str = "", piece: int = 7) -> list[dict]:
    """A chat's answer in pieces of so many characters."""
    deltas = [{"role": "assistant", "content": ""}]
    deltas += [{"reasoning_content": thought}] if thought else []
    deltas += [{"content": text[at : at + piece]} for at in range(0, len(text), piece)]
    events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    return [*events, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], "stats": STATS}]


class Visit:
    """A page and the server behind it."""

    def __init__(self, page: Page, url: str, key: str | None, shots: Path):
        self.page, self.url, self.key, self.shots = page, url, key, shots

    def api(self, messages: list[dict], **options: object) -> str:
        """The same answer without the page and without a stream."""
        return self.post("chat/completions", {"messages": messages, **options})["choices"][0]["message"]["content"]

    def post(self, path: str, body: dict) -> dict:
        """The answer of an endpoint to a body."""
        return self._get(path, json.dumps(body).encode())

    def has(self, path: str) -> bool:
        """Whether the server has an endpoint."""
        try:
            self.post(path, {})
        except urllib.error.HTTPError as error:
            return error.code not in (404, 405)
        return True

    def _get(self, path: str, body: bytes | None = None) -> dict:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/v1/{path}", body, headers)) as got:
            return json.load(got)

    def set(self, **values: object) -> None:
        """Fill in settings without opening them."""
        for name, value in values.items():
            self.page.evaluate(SET, [name, str(value)])

    def give(self, way: str, name: str, kind: str, data: bytes) -> None:
        """Drop or paste a file."""
        self.page.evaluate(GIVE, [way, name, kind, base64.b64encode(data).decode()])

    def ask(self, prompt: str, seed: int | None = 0) -> str:
        """Type, send, wait for the end; returns the text of the answer."""
        self.set(seed="" if seed is None else seed)
        self.page.fill("#prompt", "")
        self.page.type("#prompt", prompt)
        self.page.keyboard.press("Enter")
        return self.answer()

    def answer(self) -> str:
        """Wait for the end of an answer; returns its text."""
        self.page.locator("#go", has_text="Send").wait_for()
        said = self.page.locator(".answer .markdown")
        return said.last.text_content() if said.count() else ""

    def stand_in(self, text: str, thought: str = "", piece: int = 7) -> None:
        """The next chats are answered with this text, without the server."""
        self.page.unroute("**/v1/chat/completions")
        self.route("chat/completions", stream(*answer_events(text, thought, piece)))

    def route(self, path: str, body: str | dict) -> None:
        """An endpoint answers with this: a stream or JSON."""

        def fulfil(route: Route) -> None:
            if isinstance(body, str):
                route.fulfill(status=200, content_type="text/event-stream", body=body)
            else:
                route.fulfill(status=200, json=body)

        self.page.route(f"**/v1/{path}", fulfil)

    def foot(self, where: str = ".answer") -> str:
        """The line below the last answer."""
        return self.page.locator(f"{where} .foot").last.inner_text().replace("\n", " ")

    def shoot(self, name: str) -> None:
        """A screenshot in both themes."""
        for theme in ("light", "dark"):
            self.page.emulate_media(color_scheme=theme)
            self.page.wait_for_timeout(60)
            self.page.screenshot(path=self.shots / f"{name}-{theme}.png")
        self.page.emulate_media(color_scheme="light")

    def fits(self, what: str) -> None:
        """Nothing is cut and nothing scrolls sideways at the width of a phone."""
        self.page.set_viewport_size(PHONE)
        wide, outside = self.page.evaluate("document.documentElement.scrollWidth"), self.page.evaluate(INSIDE)
        check(f"{what} fits a phone", wide <= PHONE["width"] and not outside, outside or wide)
        self.shoot(f"phone-{what.replace(' ', '-')}")
        self.page.set_viewport_size(DESK)
