"""The page as a file: it asks no other host, runs under the server's policy, and is readable in both themes.

What it does in a browser is bench/page.py's.
"""

import re
from html.parser import HTMLParser
from pathlib import Path

import mlx_dgemma

PAGE = (Path(mlx_dgemma.__file__).parent / "server" / "page.html").read_text(encoding="utf-8")
SCRIPT = PAGE.partition("<script>")[2].partition("</script>")[0]
STYLE = PAGE.partition("<style>")[2].partition("</style>")[0]


class Elements(HTMLParser):
    """All elements of the page with their attributes."""

    def __init__(self):
        super().__init__()
        self.found = []
        self.feed(PAGE)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


FOUND = Elements().found
IDS = [attributes["id"] for _, attributes in FOUND if "id" in attributes]


def test_nothing_comes_from_elsewhere():
    assert not re.findall(r"\w+://|[\"'(=]\s*//|@import|url\(", PAGE)
    linked = {(tag, name): value for tag, given in FOUND for name, value in given.items() if name in ("src", "href")}
    assert linked == {("link", "href"): "data:,"}  # or the browser asks for /favicon.ico
    assert re.findall(r'fetch\(\s*"([^"]*)"', SCRIPT) == ["/v1/chat/completions", "/v1/models"]
    assert SCRIPT.count("fetch(") == 2
    assert not re.findall(r"XMLHttpRequest|WebSocket|EventSource|sendBeacon|import\b|location", SCRIPT)


def test_it_runs_under_the_policy():
    tags = {tag for tag, _ in FOUND}
    assert not tags & {"base", "iframe", "object", "embed", "audio", "video"}
    assert [given for tag, given in FOUND if tag in ("script", "style")] == [{}, {}]  # inline, one each
    assert not [name for tag, given in FOUND for name in given if name.startswith("on") or name == "action"]
    assert not re.findall(r"\beval\b|\bFunction\b|new Worker|set(Timeout|Interval)\(\s*[\"'`]", SCRIPT)


def test_text_never_becomes_markup():
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextualFragment|srcdoc", SCRIPT)
    assert "textContent" in SCRIPT


def test_ids_are_single_and_exist():
    assert len(set(IDS)) == len(IDS)
    used = set(re.findall(r'\$\("([^"]+)"\)', SCRIPT)) | set(re.findall(r"#([a-z]+)\b(?=[ .:{\"])", SCRIPT))
    assert used and used <= set(IDS)
    selectors = " ".join(re.findall(r"[^{};]+(?=\{)", STYLE))
    assert "prompt" in (styled := set(re.findall(r"#(\w+)", selectors))) and styled <= set(IDS)


def test_every_control_has_a_name():
    labelled = {given.get("for") for tag, given in FOUND if tag == "label"}
    inside = {id for label in re.findall(r"<label>.*?</label>", PAGE, re.S) for id in re.findall(r'id="(\w+)"', label)}
    controls = [given for tag, given in FOUND if tag in ("input", "select", "textarea") and "hidden" not in given]
    assert {one["id"] for one in controls} == {"key", "prompt", "mode", "thinking", "tokens", "seed"}
    assert all(one["id"] in labelled | inside for one in controls)
    described = [given["aria-describedby"] for _, given in FOUND if "aria-describedby" in given]
    assert described and set(described) <= set(IDS)
    assert ("html", {"lang": "en"}) in FOUND


def luminance(color):
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one, other):
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_contrast_in_both_themes():
    assert round(contrast("#000000", "#ffffff"), 3) == 21
    pairs = dict(re.findall(r"--([a-z-]+): (?:light-dark\()?((?:#[0-9a-f]{6}(?:, )?)+)", STYLE))
    for theme in (0, 1):
        color = {name: values.split(", ")[theme if "," in values else 0] for name, values in pairs.items()}
        readable = [(ink, ground) for ink in ("text", "soft", "tint") for ground in ("ground", "raised", "fill")]
        for ink, ground in [*readable, ("alarm", "alarm-fill")]:
            assert contrast(color[ink], color[ground]) >= 4.5, (theme, ink, ground)
        assert contrast("#ffffff", color["button"]) >= 4.5
        shown = contrast(color["noise"], color["ground"])
        assert 1.3 <= shown < contrast(color["soft"], color["ground"]), theme  # unsure tokens are faint, not gone


def test_only_finished_text_is_announced():
    assert 'this.said.setAttribute("aria-live", "polite")' in SCRIPT
    assert 'this.node.setAttribute("aria-hidden", "true")' in SCRIPT  # the canvas
    assert [given["id"] for _, given in FOUND if "aria-live" in given] == ["error"]
    assert "prefers-reduced-motion: reduce" in STYLE
