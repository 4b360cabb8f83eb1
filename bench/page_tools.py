"""Parts of bench/page.py: the tabs, and what infill, edit and decide show."""

import json

from page_visit import STATS, Visit, check, stream

BEFORE, BEHIND = "def add(a, b):\n    return a ", " b"
EDIT = ("The cat saw a cat in the meadow.", "Replace cat with dog")
LARGER = "Which is larger, 51 or 23?"


def tabs(visit: Visit) -> None:
    """The tabs are reached with the arrows, and only one is shown."""
    page = visit.page
    page.focus("#tab-chat")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "End", "ArrowLeft", "Home"):
        page.keyboard.press(key)
        shown = page.locator("[role=tabpanel]:visible").get_attribute("id")
        seen.append(shown if page.evaluate("document.activeElement.id") == f"tab-{shown}" else "")
    check("tabs by arrows", seen == ["infill", "edit", "decide", "chat", "decide", "edit", "chat"], seen)


def fill(visit: Visit) -> None:
    """A hole is filled with the API's text, marked between what stays."""
    page = visit.page
    page.click("#tab-infill")
    page.fill("#infill-text", "no hole")
    page.click("#infill-go")
    page.locator("#error", has_text="There is no hole").wait_for()
    page.fill("#infill-text", BEFORE + "?" + BEHIND)
    page.evaluate("(at) => document.querySelector('#infill-text').setSelectionRange(at, at + 1)", len(BEFORE))
    page.click("#make-hole")
    check("a selection becomes the hole", page.locator("#infill-text").input_value() == f"{BEFORE}[hole]{BEHIND}")
    visit.set(seed=0)
    page.keyboard.press("ControlOrMeta+Enter")
    page.locator("#infill-foot button", has_text="Go on").wait_for(timeout=120_000)
    asked = visit.post("completions", {"prompt": BEFORE, "suffix": BEHIND, "seed": 0})["choices"][0]["text"]
    found = page.locator("#infill-shown mark").text_content()
    check("the fill is the API's", found == asked != "", found)
    fixed = page.locator("#infill-shown .fixed").all_text_contents()
    check("what stays is around it", fixed == [BEFORE, BEHIND], fixed)
    visit.shoot("infill")
    visit.fits("infill")
    page.locator("#infill-foot button", has_text="Go on").click()
    check("one goes on with the whole", page.locator("#infill-text").input_value() == BEFORE + found + BEHIND)


def edit(visit: Visit) -> None:
    """An edit shows what stays, what goes and what comes."""
    page, (text, instruction) = visit.page, EDIT
    real = visit.has("edits")
    if not real:
        ends = {"index": 0, "text": text.replace("cat", "dog"), "finish_reason": "stop"}
        visit.route("edits", stream({"choices": [{**ends, "text": ""}]}, {"choices": [ends], "stats": STATS}))
    kind = "" if real else " (of a stand-in)"
    page.click("#tab-edit")
    page.fill("#edit-text", text)
    page.click("#edit-go")
    page.locator("#error", has_text="There is no instruction").wait_for()
    page.fill("#edit-instruction", instruction)
    visit.set(seed=0)
    with page.expect_request("**/v1/edits") as sent:
        page.click("#edit-go")
    page.locator("#edit-foot strong").wait_for(timeout=120_000)
    body = json.loads(sent.value.post_data)
    parts = {tag: page.locator(f"#edit-shown {tag}").all_text_contents() for tag in ("del", "ins")}
    if real:
        asked = visit.post("edits", {"input": text, "instruction": instruction, "strength": 0.5, "seed": 0})
        page.locator("#edit-foot button", has_text="Without marks").click()
        shown = page.locator("#edit-shown").text_content()
        check("an edit is the API's", shown == asked["choices"][0]["text"], shown)
        page.locator("#edit-foot button", has_text="Without marks").click()
    check("an edit is asked for", (body["input"], body["strength"], body["seed"]) == (text, 0.5, 0), body)
    marked = parts == {"del": ["[out: cat]"] * 2, "ins": ["[in: dog]"] * 2}
    check(f"what goes and comes is marked{kind}", marked, parts)
    lines = [
        page.evaluate(f"getComputedStyle(document.querySelector('#edit-shown {tag}')).textDecorationLine")
        for tag in ("del", "ins")
    ]
    check("not by colours alone", lines == ["line-through", "underline"], lines)
    check("and counted", "2 words out, 2 words in" in visit.foot("#edit"), visit.foot("#edit"))
    visit.shoot("edit")
    visit.fits("edit")


def decide(visit: Visit) -> None:
    """A decision shows a bar and a percentage for each option."""
    page = visit.page
    real = visit.has("decisions")
    if not real:
        chances = [{"value": "23", "probability": 0.04}, {"value": "51", "probability": 0.96}]
        answer = {"type": "choice", "name": "answer", "choice": "51", "confidence": 0.8, "probabilities": chances}
        visit.route("decisions", {"answers": [answer], "usage": {"input_tokens": 20}})
    page.click("#tab-decide")
    page.fill("#question", LARGER)
    page.fill("#options", "23")
    page.click("#decide-go")
    page.locator("#error", has_text="needs two options").wait_for()
    page.fill("#options", "23\n51\n")
    page.uncheck("#listed")
    visit.set(seed=0)
    with page.expect_request("**/v1/decisions") as sent:
        page.click("#decide-go")
    page.locator("#bars li").nth(1).wait_for(timeout=120_000)
    names, shares = (page.locator(f"#bars .bar-{part}").all_inner_texts() for part in ("name", "share"))
    if real:
        answer = visit.post("decisions", json.loads(sent.value.post_data))["answers"][0]
    wanted = sorted(((one["probability"], one["value"]) for one in answer["probabilities"]), reverse=True)
    same = list(zip(shares, names)) == [(f"{100 * share:.1f} %", name) for share, name in wanted]
    check(f"a decision is the API's{'' if real else ' (of a stand-in)'}", same, (names, shares))
    wide = [
        one.bounding_box()["width"] / page.locator(".bar-track").first.bounding_box()["width"]
        for one in page.locator(".bar-fill").all()
    ]
    close = all(abs(width - share) < 0.02 for width, (share, _) in zip(wide, wanted))
    check("bars are as long as the percentages", close, wide)
    check("the best is said", page.locator("#decided").inner_text() == f"{names[0]}, {shares[0]}")
    visit.shoot("decide")
    visit.fits("decide")
    page.select_option("#kind", "number")
    check("a number has a range", page.locator("#range-row").is_visible() and page.locator("#options").is_hidden())
    page.select_option("#kind", "predicate")
    check("yes or no needs neither", not page.locator("#range-row, #options-row").locator("visible=true").count())
    page.click("#tab-chat")
