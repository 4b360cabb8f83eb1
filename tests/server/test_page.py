"""The page as files: it asks no other host, runs under a strict policy, and is readable in both themes.

What it does in a browser is bench/page.py's.
"""

import asyncio
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest

from mlx_dgemma.server import page

FILES = {path: file.read_text(encoding="utf-8") for path, file in page.FILES.items()}
PAGE, STYLE = FILES["/"], FILES["/page/page.css"]
SCRIPTS = {path.removeprefix("/page/"): text for path, text in FILES.items() if path.endswith(".js")}
SCRIPT = "\n".join(SCRIPTS.values())
ENDPOINTS = {"/v1/chat/completions", "/v1/completions", "/v1/edits", "/v1/decisions", "/v1/models"}


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
    for path, text in FILES.items():
        assert not re.findall(r"\w+://|[\"'(=]\s*//|@import|url\(", text), path
    linked = {value for _, given in FOUND for name, value in given.items() if name in ("src", "href")}
    assert linked == {
        "data:,",
        "/page/page.css",
        "/page/theme.js",
        "/page/page.js",
    }
    assert set(re.findall(r'"(/v1/[^"]*)"', SCRIPT)) == ENDPOINTS
    asks = r"\bfetch\(|XMLHttpRequest|WebSocket|EventSource|sendBeacon|importScripts|import\(|\blocation\b|window\.open"
    assert {name: re.findall(asks, text) for name, text in SCRIPTS.items() if re.search(asks, text)} == {
        "api.js": ["fetch("] * 2
    }
    assert re.findall(r"fetch\(([^,]*),", SCRIPT) == ['"/v1/models"', "path"]
    assert re.findall(r"post\(([^,]*), body", SCRIPT.replace("post(path", "")) == [
        '"/v1/chat/completions"',
        '"/v1/decisions"',
        '"/v1/edits"',
        '"/v1/completions"',
    ]
    modules = set(re.findall(r'^(?:import|export) .*?"([^"]*)";$', SCRIPT, re.MULTILINE))
    assert modules <= {f"./{name}" for name in SCRIPTS}
    # a web address of a link, a picture of the user's, a file to save
    addresses = re.findall(r"\b(?:href|src)(?: =|:) ([^,;}]*)", SCRIPT)
    assert sorted(addresses) == ["URL.createObjectURL(new Blob([text]", "url", "url.href"]


def test_it_runs_under_the_policy():
    policy = dict(one.strip().partition(" ")[::2] for one in page.CONTENT_SECURITY_POLICY.split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "data: blob:"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    tags = {tag for tag, _ in FOUND}
    assert not tags & {"base", "iframe", "object", "embed", "audio", "video", "img", "style", "svg"}
    whole = r'<script(?: type="module")? src="[^"]*"></script>'
    assert PAGE.count("<script") == len(re.findall(whole, PAGE)) == 2
    assert not [name for tag, given in FOUND for name in given if name.startswith("on") or name in ("action", "style")]
    assert not re.findall(r"\beval\b|\bFunction\b|new Worker|set(Timeout|Interval)\(\s*[\"'`]", SCRIPT)


def test_text_never_becomes_markup():
    sinks = r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextualFragment|srcdoc|DOMParser|setHTML"
    assert not re.findall(sinks + r"|parseFromString|XSLT|cssText|createElementNS|setAttributeNode", SCRIPT)
    assert re.findall(r"createElement\((.*?)\)", SCRIPT) == ["tag"]
    made = set(re.findall(r'make\("(\w+)"', SCRIPT)) | set(re.findall(r'\? "(\w+)" : "(?:ul|ins)"', SCRIPT))
    assert not made & {
        "script",
        "style",
        "iframe",
        "object",
        "embed",
        "link",
        "meta",
        "base",
        "form",
        "svg",
        "template",
    }
    computed = set(re.findall(r"make\(([^\"][^,]*),", SCRIPT)) - {"tag, name"}
    assert computed == {"tag", "node.type", "`h${Math.min(6", 'ordered ? "ol" : "ul"', 'kind < 0 ? "del" : "ins"'}
    types = set(re.findall(r'type: (?:mark === \S+ \? )?"(\w+)"|\? "(\w+)" : "(\w+)", inside', SCRIPT))
    assert {"em", "strong", "del"} <= {one for found in types for one in found}
    names = re.findall(r'setAttribute\("([\w-]+)"', SCRIPT)
    assert names and all(name.startswith("aria-") or name == "role" for name in names)
    assert SCRIPT.count("setAttribute(") == len(names)


def test_ids_are_single_and_exist():
    assert len(set(IDS)) == len(IDS)
    used = set(re.findall(r'\$\("([^"]+)"\)', SCRIPT))
    assert used and used <= set(IDS), used - set(IDS)
    selectors = " ".join(re.findall(r"[^{};]+(?=\{)", STYLE))
    assert "prompt" in (styled := set(re.findall(r"#([\w-]+)", selectors))) and styled <= set(IDS), styled - set(IDS)
    lists = ("aria-controls", "aria-labelledby", "aria-describedby", "for")
    named = {given[name] for _, given in FOUND for name in lists if name in given}
    assert len(named) > 10 and named <= set(IDS), named - set(IDS)


def test_every_control_has_a_name():
    labelled = {given.get("for") for tag, given in FOUND if tag == "label"}
    inside = {
        id for label in re.findall(r"<label[ >].*?</label>", PAGE, re.S) for id in re.findall(r'id="([\w-]+)"', label)
    }
    controls = [given for tag, given in FOUND if tag in ("input", "select", "textarea") and "hidden" not in given]
    assert {"key", "prompt", "mode", "thinking", "tokens", "seed", "system"} <= {one["id"] for one in controls}
    assert all(one["id"] in labelled | inside for one in controls)
    assert ("html", {"lang": "en"}) in FOUND
    tabs = [given for _, given in FOUND if given.get("role") == "tab"]
    panels = {given["id"]: given["aria-labelledby"] for _, given in FOUND if given.get("role") == "tabpanel"}
    assert {one["aria-controls"]: one["id"] for one in tabs} == panels and len(panels) == 4


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
        readable += [("alarm", "alarm-fill"), ("in", "in-fill"), ("text", "mark-fill"), ("text", "chosen")]
        for ink, ground in readable:
            assert contrast(color[ink], color[ground]) >= 4.5, (theme, ink, ground)
        assert contrast("#ffffff", color["button"]) >= 4.5
        shown = contrast(color["noise"], color["ground"])
        assert 1.3 <= shown < contrast(color["soft"], color["ground"]), theme  # unsure tokens are faint, not gone


def test_colours_are_not_the_only_sign():
    for rule in (r"\.result del \{[^}]*line-through", r"\.result ins \{[^}]*underline", r"\.fill \{[^}]*border-bottom"):
        assert re.search(rule, STYLE), rule
    assert '"[out: "' in SCRIPT and '"[in: "' in SCRIPT and '"[filled: "' in SCRIPT  # what a screen reader says


def test_only_finished_text_is_announced():
    assert 'this.node.setAttribute("aria-hidden", "true")' in SCRIPTS["answer.js"]  # the canvas
    live = {given["id"] for _, given in FOUND if "aria-live" in given}
    assert live == {"error", "heard", "infill-shown", "edit-shown", "decided"}
    assert "prefers-reduced-motion: reduce" in STYLE


@pytest.mark.parametrize("path", sorted(page.FILES))
def test_every_file_comes_with_the_policy(path):
    (route,) = [one for one in page.page_routes() if one.path == path]
    answer = asyncio.run(route.endpoint(SimpleNamespace(url=SimpleNamespace(path=path))))
    assert answer.body.decode() == FILES[path]
    assert answer.headers["content-security-policy"] == page.CONTENT_SECURITY_POLICY
    assert answer.headers["content-type"].startswith(page.TYPES[page.FILES[path].suffix])


def test_files_are_short():
    for path, text in FILES.items():
        assert len(text.splitlines()) <= 450 and max(map(len, text.splitlines())) <= 120, path
