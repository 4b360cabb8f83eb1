"""The server's page in a headless browser: what somebody does with it and sees.

    mlx-dgemma serve --port 8000 &
    python bench/page.py http://127.0.0.1:8000 --shots shots       # pip install playwright, and a Chromium

Expects the bundled demo behind the page. Prints every check and a last line of JSON; exits with 1 where one failed.
"""

import argparse
import base64
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from page_answers import history, hostile, markdown
from page_tools import decide, edit, fill, tabs
from page_visit import DESK, FAILED, PREPARE, Visit, check, user
from PIL import Image, ImageDraw
from playwright.sync_api import sync_playwright

PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."
STORY = "Tell a story about a fox named Iris."
NAME, HOME = "My name is Leo and I live in Oslo.", "Where do I live?"
ENDLESS = "Count from 1 to 25."
COLOR = "What color is the shape?"
# Every drawing of a canvas as text and shades; what a screen reader is told of finished text.
WATCH = """() => {
  window.drawn = new Set(); window.told = []; window.shown = new Set();
  new MutationObserver((changes) => {
    const canvas = [...document.querySelectorAll(".canvas")].pop();
    if (canvas?.childElementCount) {
      window.shown.add(canvas.textContent);
      window.drawn.add([...canvas.children].map((one) => one.textContent + one.style.cssText).join("|"));
    }
    for (const { target, addedNodes } of changes) {
      if (target.closest?.("[aria-live]")) window.told.push(...[...addedNodes].map((node) => node.textContent));
    }
  }).observe(document.body, { childList: true, subtree: true, attributes: true, characterData: true });
}"""
FOCUS = """() => {
  const one = document.activeElement, style = getComputedStyle(one);
  return [one.id || one.textContent.trim(), style.outlineStyle !== "none" || one.matches("#prompt")];
}"""


def picture(color: tuple[int, int, int]) -> bytes:
    """A PNG of a square."""
    drawn = Image.new("RGB", (160, 160), (250, 250, 250))
    ImageDraw.Draw(drawn).rectangle((54, 54, 106, 106), fill=color)
    file = io.BytesIO()
    drawn.save(file, "PNG")
    return file.getvalue()


def catch(visit: Visit, seed: int, name: str) -> str:
    """Ask for a story and take a screenshot of its canvas while it settles; returns the text at last."""
    visit.page.evaluate("window.pace = 250")
    visit.set(seed=seed)
    visit.page.fill("#prompt", STORY)
    visit.page.keyboard.press("Enter")
    visit.page.locator(".canvas span").nth(8).wait_for(state="attached")
    visit.page.screenshot(path=visit.shots / f"{name}.png")
    check("a canvas is hidden from screen readers", visit.page.locator(".canvas[aria-hidden=true] span").count() > 8)
    visit.page.evaluate("window.pace = 0")
    return visit.answer()


def unlock(visit: Visit) -> None:
    """The key's field shows itself once it is needed."""
    page = visit.page
    if visit.key is None:
        return check("no field for a key", not page.locator("#keyrow").is_visible())
    page.wait_for_selector("#keyrow:not([hidden])")
    page.fill("#key", "wrong")
    visit.ask(PROMPT)
    check("a wrong key is told", page.locator("#error").inner_text() != "", page.locator("#error").inner_text())
    visit.shoot("key")
    page.fill("#key", visit.key)
    page.keyboard.press("Enter")
    page.locator(".answer .foot button").first.wait_for()
    check("the right key is taken", page.locator(".answer").count() == 1 and not page.locator("#keyrow").is_visible())
    page.click("#fresh")
    return None


def settling(visit: Visit) -> None:
    """A canvas is drawn while it settles, and ends as the API's text."""
    page = visit.page
    page.evaluate(WATCH)
    said = visit.ask(PROMPT)
    check("the text is the API's", said == visit.api([user(PROMPT)], seed=0) != "", said)
    check(
        "statistics", all(word in visit.foot() for word in ("tokens", "step", " s", "tokens/s", "seed 0")), visit.foot()
    )
    page.click("#fresh")
    told = catch(visit, 1, "settling-light")
    check("a story is the API's", told == visit.api([user(STORY)], seed=1) != "", told)
    drawn, shown, heard = page.evaluate("[window.drawn.size, window.shown.size, window.told]")
    check("canvases are drawn while they settle", drawn >= 4, f"{drawn} drawings, {shown} texts")
    check("only finished text is announced", "".join(heard) == said + told)
    check("no canvas is left", page.locator(".canvas span").count() == 0)


def conversation(visit: Visit) -> None:
    """A second turn is asked behind the first (the demo answers it badly)."""
    visit.page.click("#fresh")
    first = visit.ask(NAME)
    second = visit.ask(HOME)
    turns = [user(NAME), {"role": "assistant", "content": first}, user(HOME)]
    check("the second turn is the API's", second == visit.api(turns, seed=0) != "", second)
    visit.shoot("conversation")


def options(visit: Visit) -> None:
    """What is set reaches the model, survives a reload, and is told beside the prompt."""
    page = visit.page
    page.click("#fresh")
    visit.set(tokens=20)
    for mode in ("exact", "fast"):
        page.click("#open-settings")
        page.select_option("#mode", mode)
        page.keyboard.press("Escape")
        said = visit.ask(STORY)
        same = said == visit.api([user(STORY)], seed=0, max_tokens=20, **{mode: True}) != ""
        check(
            f"mode {mode} and tokens are the API's",
            same and "Cut" in visit.foot() and "20 tokens" in visit.foot(),
            said,
        )
        page.click("#fresh")
    visit.set(tokens="")
    for mode in ("causal", "speculative"):
        visit.set(mode=mode, temperature=0.5)
        said = visit.ask(PROMPT)
        same = said == visit.api([user(PROMPT)], seed=0, mode=mode, temperature=0.5) != ""
        check(f"mode {mode} and temperature are the API's", same, said)
        page.click("#fresh")
    page.click("#open-settings")
    visit.shoot("settings")
    page.fill("#system", "Answer in uppercase.")
    page.locator("#settings button", has_text="Done").click()
    visit.set(mode="", temperature="")
    said = visit.ask("What is the capital of France?")
    system = {"role": "system", "content": "Answer in uppercase."}
    asked = visit.api([system, user("What is the capital of France?")], seed=0)
    check("the system prompt is the API's", said == asked and page.locator("#system-shown").is_visible(), said)
    check("settings are told beside the prompt", page.locator("#summary").inner_text() == "system prompt · seed 0")
    page.reload()
    page.locator(".answer").wait_for()
    kept = page.locator("#system").input_value(), page.locator("#seed").input_value()
    check("the system prompt survives a reload, the seed does not", kept == ("Answer in uppercase.", ""), kept)
    page.click("#summary")
    page.click("#reset")
    page.keyboard.press("Escape")
    check("and is reset", page.locator("#summary").is_hidden())
    page.click("#fresh")
    visit.ask(PROMPT, seed=None)
    page.locator(".foot button", has_text="seed").click()
    check("a drawn seed can be used again", f"seed {page.locator('#seed').input_value()}" in visit.foot(), visit.foot())
    first = page.locator(".answer .markdown").text_content()
    page.locator(".foot button", has_text="Again").click()
    again = visit.answer(), page.locator(".answer").count(), page.locator(".asked").count()
    check("Again asks again, here with the same seed", again == (first, 1, 1), again)


def theme(visit: Visit) -> None:
    """The theme follows the system and can be chosen."""
    page, ground = visit.page, "getComputedStyle(document.body).backgroundColor"
    seen = {}
    for system in ("light", "dark"):
        page.emulate_media(color_scheme=system)
        for _ in range(3):
            seen[system, page.locator("#theme").inner_text()[2:]] = page.evaluate(ground)
            page.click("#theme")
    light, dark = seen["light", "Auto"], seen["dark", "Auto"]
    chosen = {system: (seen[system, "Light"], seen[system, "Dark"]) for system in ("light", "dark")}
    check("themes", light != dark and set(chosen.values()) == {(light, dark)}, (light, dark))
    page.emulate_media(color_scheme="dark")
    page.click("#fresh")
    catch(visit, 2, "settling-dark")
    page.emulate_media(color_scheme="light")


def pictures(visit: Visit) -> None:
    """Pictures are dropped, shown, removed and seen."""
    page = visit.page
    page.click("#fresh")
    check("a new conversation is empty", page.locator(".answer").count() == 0 and page.locator("#welcome").is_visible())
    red, green, blue = (picture(color) for color in ((220, 40, 40), (40, 170, 60), (50, 80, 220)))
    page.set_input_files("#files", {"name": "red.png", "mimeType": "image/png", "buffer": red})
    page.get_by_label("Remove red.png").wait_for()
    visit.give("paste", "green.png", "image/png", green)
    page.get_by_label("Remove green.png").wait_for()
    visit.give("drop", "blue.png", "image/png", blue)
    page.get_by_label("Remove blue.png").wait_for()
    page.get_by_label("Remove green.png").click()
    page.get_by_label("Remove red.png").click()
    check("chosen, pasted, dropped; and removed", page.locator("#pictures img").count() == 1)
    page.fill("#prompt", COLOR)
    visit.shoot("composing")
    said = visit.ask(COLOR)
    url = "data:image/png;base64," + base64.b64encode(blue).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": COLOR}]
    check("a picture is seen", "blue" in said and said == visit.api([user(content)], seed=0), said)
    visit.shoot("picture")


def errors(visit: Visit) -> None:
    """A refusal is shown as a sentence, and the prompt is not lost."""
    page = visit.page
    answers = page.locator(".answer").count()
    visit.give("drop", "notes.txt", "text/plain", b"notes")
    page.locator("#error", has_text="notes.txt").wait_for()
    check("only pictures are taken", "notes.txt is not a picture" in page.locator("#error").inner_text())
    visit.give("drop", "broken.png", "image/png", picture((0, 0, 0))[:60])
    page.wait_for_selector("#pictures img")
    visit.ask(COLOR)
    told = page.locator("#error").inner_text()
    check("a refusal is shown", len(told) > 10 and "{" not in told, told)
    back = page.locator("#prompt").input_value(), page.locator("#pictures img").count()
    check("prompt and picture come back", back == (COLOR, 1) and page.locator(".answer").count() == answers, back)
    visit.shoot("error")
    page.locator("#pictures button").click()
    visit.ask("<img src=x onerror=alert(1)><b>hi</b>")
    check("markup stays text", page.locator(".asked b, .asked img[src=x]").count() == 0)


def keyboard(visit: Visit) -> None:
    """Everything is reached, seen and stopped with keys alone."""
    page = visit.page
    page.click("#fresh")
    visit.set(seed=0)
    seen, order = True, []
    for _ in range(5):
        name, visible = page.evaluate(FOCUS)
        order.append(name)
        seen = seen and visible
        page.keyboard.press("Tab")
    check("focus order", order == ["prompt", "attach", "thinking", "summary", "go"], order)
    check("focus is visible", seen)
    page.focus("#prompt")
    page.keyboard.type("What is 25 +")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("38?")
    check("Shift and Enter begins a line", page.locator("#prompt").input_value() == "What is 25 +\n38?")
    page.keyboard.press("ControlOrMeta+a")
    page.keyboard.type("What is 25 + 38?")
    page.focus("#thinking")
    page.keyboard.press("Space")
    page.keyboard.press("Enter")
    said = visit.answer()
    thought = page.locator(".thought").last
    check("a thought is folded", "Tens" in thought.text_content() and thought.get_attribute("open") is None, said)
    thought.locator("summary").focus()
    page.keyboard.press("Enter")
    check("and opens", thought.get_attribute("open") is not None)
    visit.shoot("thinking")
    page.uncheck("#thinking")
    page.click("#fresh")
    page.evaluate("window.pace = 60")
    page.keyboard.type(ENDLESS)
    page.keyboard.press("Enter")
    page.locator(".answer .markdown > p", has_text="1, 2, 3").wait_for()
    page.keyboard.press("Escape")
    page.evaluate("window.pace = 0")
    said = visit.answer()
    check("Escape stops and keeps what is finished", "Stopped" in visit.foot() and said.startswith("1, 2, 3"), said)
    visit.ask(HOME)
    check("the conversation goes on", page.locator(".answer").count() == 2)
    page.click("#fresh")
    page.evaluate("window.pace = 60")
    page.keyboard.type(ENDLESS)
    page.keyboard.press("Enter")
    page.locator(".answer .markdown > p", has_text="1, 2, 3").wait_for()
    page.reload()
    page.locator(".answer .foot", has_text="Stopped").wait_for()
    kept = page.locator(".answer .markdown").text_content()
    check("a reload keeps what is finished of an answer", kept.startswith("1, 2, 3"), kept)


def phone(visit: Visit) -> None:
    """Nothing is cut at the width of a phone; the conversations are a drawer there."""
    page = visit.page
    page.click("#fresh")
    visit.ask(PROMPT)
    visit.fits("conversation")
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator("#history").wait_for(state="hidden")
    page.click("#side")
    page.locator("#conversations .title").first.wait_for()
    visit.shoot("phone-history")
    page.locator("#conversations .title").first.focus()
    page.keyboard.press("Escape")
    back = page.locator("#history").is_hidden(), page.evaluate("document.activeElement.id")
    check("Escape closes it and returns", back == (True, "side"), back)
    page.click("#open-settings")
    page.locator("#settings").wait_for()
    page.set_viewport_size(DESK)
    visit.fits("settings")
    page.keyboard.press("Escape")
    page.click("#fresh")
    visit.fits("welcome")


VISITS: list[Callable[[Visit], None]] = [
    settling,
    conversation,
    options,
    theme,
    pictures,
    errors,
    keyboard,
    tabs,
    fill,
    edit,
    decide,
    phone,
    markdown,
    hostile,
    history,
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--key", help="the server's API key, if it asks for one")
    parser.add_argument("--shots", type=Path, required=True, help="folder for screenshots")
    parser.add_argument("--browser", default="/usr/bin/chromium")
    parser.add_argument("--only", help="one part, such as edit")
    args = parser.parse_args()
    args.shots.mkdir(parents=True, exist_ok=True)
    url, hosts, problems = args.url.rstrip("/"), set(), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.browser, args=["--no-sandbox"])
        context = browser.new_context(viewport=DESK, color_scheme="light")
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
        page = context.new_page()
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda one: one.type in ("error", "warning") and problems.append(one.text))
        page.add_init_script(f"({PREPARE})()")
        policy = page.goto(url).headers.get("content-security-policy", "")
        check(
            "a policy lets the page ask nobody else", "default-src 'none'" in policy and "connect-src 'self'" in policy
        )
        check("and runs no script of a text's", "unsafe" not in policy and "trusted-types 'none'" in policy)
        visit = Visit(page, url, args.key, args.shots)
        visit.shoot("welcome")
        unlock(visit)
        for one in VISITS:
            if args.only in (None, one.__name__):
                one(visit)
        browser.close()
    check("no request leaves for another host", hosts <= {urlsplit(url).netloc, ""}, hosts)
    meant = ("status of 400", "status of 401", "requires 'TrustedHTML'")
    refusals = [one for one in problems if any(part in one for part in meant)]
    check("no error in the console", problems == refusals, [one for one in problems if one not in refusals])
    print(json.dumps({"bench": "page", "failed": FAILED}))
    sys.exit(bool(FAILED))


if __name__ == "__main__":
    main()
