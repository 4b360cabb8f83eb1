"""Parts of bench/page.py: Markdown of answers, answers that attack the page, and conversations that are kept."""

import json

from page_visit import Visit, check

RENDER = """async (sources) => {
  const { Rendered } = await import("/page/render.js");
  return sources.map((source) => {
    const one = new Rendered();
    one.show(source);
    return one.node.innerHTML;
  });
}"""
# The same text in pieces and at once.
GROW = """async (source) => {
  const { Rendered } = await import("/page/render.js");
  const grown = new Rendered(), whole = new Rendered();
  for (let end = 1; end <= source.length; end++) grown.show(source.slice(0, end));
  whole.show(source);
  return grown.node.innerHTML === whole.node.innerHTML;
}"""
# Where the canvas of an answer stands that has this text so far.
STANDS = """async (texts) => {
  const { Answer } = await import("/page/answer.js");
  return texts.map((text) => {
    const one = new Answer({ text: "", thought: "", calls: [] });
    one.begin();
    one.take({ content: text });
    one.show();
    return one.canvas.node.parentElement.localName;
  });
}"""
TIMES = """async (bombs) => {
  const { inline, parse } = await import("/page/markdown.js");
  const read = (block) => {
    if (block.text !== undefined && block.type !== "code") inline(block.text);
    for (const one of [...(block.blocks ?? []), ...(block.items ?? []).flat()]) read(one);
    for (const cell of [block.head ?? [], ...(block.rows ?? [])].flat()) inline(cell);
  };
  const time = (text) => {
    const start = performance.now();
    parse(text).forEach(read);
    return performance.now() - start;
  };
  return bombs.map((bomb) => [4, 16].map((times) => {
    const text = bomb.repeat(Math.ceil(times * 10000 / bomb.length));
    return Math.min(time(text), time(text), time(text));
  }));
}"""
MARKDOWN = {
    "a *b* **c *d*** ~~e~~": "<p>a <em>b</em> <strong>c <em>d</em></strong> <del>e</del></p>",
    "snake_case_name and __b__": "<p>snake_case_name and <strong>b</strong></p>",
    "2 * 3 * 4 \\*not\\*": "<p>2 * 3 * 4 *not*</p>",
    "`a*b*` and ``c`d``": "<p><code>a*b*</code> and <code>c`d</code></p>",
    "# A\n## B #\ntext\nmore": '<h2 class="level1">A</h2><h3 class="level2">B</h3><p>text\nmore</p>',
    "- a\n  - b\n    1. c\n- d": (
        '<ul class="tight"><li><p>a</p><ul class="tight"><li><p>b</p><ol class="tight" start="1"><li><p>c</p></li>'
        "</ol></li></ul></li><li><p>d</p></li></ul>"
    ),
    "3. x\n4. y": '<ol class="tight" start="3"><li><p>x</p></li><li><p>y</p></li></ol>',
    "> a\n> > b": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote>",
    "a\n\n---\n\n- [x] b": '<p>a</p><hr><ul class="tight"><li><p>☑ b</p></li></ul>',
    "a | b\n--|:-:\n1 | 2 | 3": None,
    "<b>a</b> &lt;i&gt; a<br>b": "<p>&lt;b&gt;a&lt;/b&gt; &lt;i&gt; a\nb</p>",
    "![alt](https://e.com/a.png)": '<p><span class="picture">Picture: <bdi>alt</bdi></span></p>',
    "[a](javascript:alert(1)) [b](data:text/html,c) [d](/e)": (
        "<p>[a](javascript:alert(1)) [b](data:text/html,c) [d](/e)</p>"
    ),
    "[a](https://e.com/x)": (
        '<p><span><a href="https://e.com/x" rel="noopener noreferrer" target="_blank" title="https://e.com/x">'
        '<bdi>a</bdi></a><bdi class="host"> (e.com)</bdi></span></p>'
    ),
    "https://user:secret@e.com": "<p>https://user:secret@e.com</p>",
}
SAMPLE = """# Title

Some *text* with `code`, a [link](https://e.com/a) and **bold
words**.

1. One
   ```python
   x = [1,
        2]
   ```
2. Two
   - inner

> quote

| a | b |
|---|--:|
| 1 | `2` |

```html
<script>alert(1)</script>
```
"""
ALLOWED = set(
    "div p h2 h3 h4 h5 h6 ul ol li blockquote hr pre code table thead tbody tr th td em strong del a span bdi button "
    "article details summary".split()
)
OVERRIDE, ISOLATE, SEPARATOR = "\u202e", "\u2066", "\u2028"
HOSTILE = [
    "<script>alert(1)</script><img src=x onerror=alert(1)><svg onload=alert(1)>",
    "<iframe srcdoc='<script>parent.alert(1)</script>'></iframe><style>*{display:none}</style><base href=//e.com>",
    "[a](javascript:alert(1)) [b](JaVaScRiPt:alert(1)) [c](java\tscript:alert(1)) <javascript:alert(1)>",
    "[a](data:text/html,<script>alert(1)</script>) [b](vbscript:alert(1)) [c](file:///etc/passwd) [d](blob:x)",
    "![a](https://example.com/leak.png?secret) ![b](javascript:alert(1)) ![c](data:image/svg+xml,<svg onload=x()>)",
    '[a](https://example.com/"onmouseover="alert(1)) [b](https://example.com "x\\" onclick=alert(1)")',
    "```<img src=x onerror=alert(1)>\n</code></pre><script>alert(1)</script>\n```",
    '```"onload=alert(1)\nx\n```\n~~~__proto__\ny\n~~~\n```constructor\nz\n```',
    "| <script>alert(1)</script> | `</td><img src=x onerror=alert(1)>` |\n|---|---|\n| <b onclick=alert(1)>x</b> | y |",
    "&lt;script&gt;alert(1)&lt;/script&gt; &#60;img src=x onerror=alert(1)&#62;",
    f"a{SEPARATOR}b\u2029c `{OVERRIDE}x{ISOLATE}` {OVERRIDE}reversed\n```\nif a{OVERRIDE}:{ISOLATE} pass\n```",
    "__proto__ constructor prototype hasOwnProperty toString",
    "[https://bank.example](https://evil.example) https://bank.example@evil.example/ [x](//evil.example)",
    "\x00\x01\x08\ufeff\ufffd\ud83d\ude00 \x1b[31m",
]
# Texts that take quadratic or exponential time in careless readers.
BOMBS = (
    "*a ",
    "**a* ",
    "_a_b",
    "[",
    "[](",
    "![",
    "[a](https://x ",
    "".join("`" * (i % 60 + 1) + "a" for i in range(600)),
    ">",
    "> > > > > > > > > > x\n",
    "- ",
    "  - a\n",
    "|",
    "|a|b|\n|-|-|\n",
    " ",
    "```\n",
    "~~~ a\n",
    "# # ",
    "- - x",
    "<https://a",
    "http://",
    "\\",
    "&lt;",
    "a**b",
    "* * * a",
    "1. ",
    "\t",
    "|-",
    "[a](<",
    "https://a)(",
    "x",
    "".join(" " * i + "- a\n" for i in range(60)),
)
STORED = {
    "__proto__": {"messages": [{"role": "user", "text": "a"}], "title": "from __proto__"},
    "constructor": {"messages": [{"role": "assistant", "text": "<img src=x onerror=alert(1)>"}], "title": 7},
    "bad1": "no JSON {",
    "bad2": [1, 2],
    "bad3": {"messages": "x"},
    "bad4": {"messages": [None, 3, {"role": "system", "text": "x"}]},
    "odd": {
        "messages": [
            {"role": "user", "text": {"a": 1}, "pictures": [None, {"name": "<b>", "url": "javascript:alert(1)"}]}
        ],
        "title": f"<script>alert(1)</script>{OVERRIDE}" + "x" * 500,
        "changed": "never",
    },
}
STORE = """(entries) => {
  for (const [id, value] of entries) localStorage.setItem(`conversation.${id}`, value);
}"""


def harmless(visit: Visit, where: str) -> list[str]:
    """What inside these elements is more than text and the elements that answers are made of; what ran."""
    page = visit.page
    found = page.evaluate(
        """(where) => [...document.querySelectorAll(where)].flatMap((root) => [root, ...root.querySelectorAll("*")])
          .flatMap((one) => [one.localName, ...[...one.attributes].map(({ name, value }) => `${name}=${value}`)])""",
        where,
    )
    links = {one for one in found if one.startswith(("href=", "src="))}
    bad = {one for one in found if "=" not in one} - ALLOWED | {one for one in found if one.lower().startswith("on")}
    bad |= {one for one in links if not one.startswith(("href=https://", "href=http://"))}
    return sorted(bad) + page.evaluate("window.ran")


def markdown(visit: Visit) -> None:
    """Answers are shown as Markdown, the same in pieces as at once."""
    page = visit.page
    page.click("#fresh")
    got = dict(zip(MARKDOWN, page.evaluate(RENDER, list(MARKDOWN))))
    wrong = {source: got[source] for source, wanted in MARKDOWN.items() if wanted not in (None, got[source])}
    check(f"{len(MARKDOWN)} short texts as Markdown", not wrong, wrong)
    table = got["a | b\n--|:-:\n1 | 2 | 3"]
    check("a table has its header's columns", table.count("<th") == 3 and table.count("<td") == 2, table)
    check("text that grows ends as the whole", page.evaluate(GROW, SAMPLE))
    texts = {
        "Half a": "p",
        "- a\n  - b": "p",
        "```\nx": "code",
        "a\n\n": "div",
        "|a|\n|-|\n": "div",
        "```\nx\n```": "div",
    }
    stands = page.evaluate(STANDS, list(texts))
    check("a canvas goes on where the text ends", stands == list(texts.values()), stands)
    visit.stand_in(SAMPLE, "First, a thought.")
    visit.ask("Show me everything.")
    check(
        "code has a label and a button", page.locator(".codehead").all_inner_texts() == ["python\nCopy", "html\nCopy"]
    )
    page.locator(".codehead button").first.click()
    page.locator(".codehead button", has_text="Copied").wait_for()
    check("code is copied as it is", page.evaluate("navigator.clipboard.readText()") == "x = [1,\n     2]")
    page.locator(".answer .foot button", has_text="Copy").click()
    page.locator(".answer .foot button", has_text="Copied").wait_for()
    check("an answer is copied as Markdown", page.evaluate("navigator.clipboard.readText()") == SAMPLE)
    check("a thought is folded beside it", page.locator(".thought").get_attribute("open") is None)
    visit.shoot("markdown")
    visit.fits("Markdown")
    heard = page.locator("#heard").text_content()
    check("what is read out is the text itself", heard == SAMPLE, len(heard))


def hostile(visit: Visit) -> None:
    """No answer runs anything, makes an element of its own, or asks another host."""
    page = visit.page
    page.click("#fresh")
    for text in HOSTILE:
        visit.stand_in(text, text)
        visit.ask("Attack.")
    bad = harmless(visit, ".answer")
    check(f"{len(HOSTILE)} hostile answers stay text", not bad and page.locator(".answer").count() == len(HOSTILE), bad)
    check("controls of direction are shown in code", page.locator(".answer code .control").count() == 4)
    page.reload()
    page.locator(".answer").nth(len(HOSTILE) - 1).wait_for()
    check("and after a reload", not harmless(visit, ".answer, #history li"), harmless(visit, ".answer, #history li"))
    for way in ("document.body.innerHTML = '<b>x</b>'", "document.write('<b>x</b>')"):
        refused = page.evaluate(f"() => {{ try {{ {way}; return false; }} catch {{ return true; }} }}")
        check(f"the policy refuses {way.split('(')[0].split(' =')[0]}", refused)
    times = page.evaluate(TIMES, list(BOMBS))
    slow = {bomb[:20]: (few, many) for bomb, (few, many) in zip(BOMBS, times) if many > max(9 * few, 250)}
    worst = max(many for _, many in times)
    check(f"{len(BOMBS)} bombs in linear time", not slow and worst < 2000, slow or f"worst {worst:.0f} ms of 160 kB")
    page.click("#fresh")
    visit.stand_in("x" * 400_000 + "\n\n```\n" + "y" * 400_000 + "\n```", piece=40_000)
    visit.ask("A huge line.")
    wide = page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    check("lines of 400,000 characters stay inside", wide and page.locator(".answer .code").count() == 1)
    page.unroute("**/v1/chat/completions")


def history(visit: Visit) -> None:
    """Conversations survive a reload, without pictures; they are renamed, deleted, brought back and saved as files."""
    page = visit.page
    page.evaluate("localStorage.clear()")
    page.reload()
    visit.stand_in("The **first** answer.", "A thought.")
    visit.set(system="Be brief.")
    visit.ask("First question")
    page.click("#fresh")
    visit.set(system="")
    visit.stand_in("Second answer.")
    visit.give("paste", "red.png", "image/png", b"\x89PNG")
    page.locator("#pictures img").wait_for()
    visit.ask("Second question")
    titles = page.locator("#conversations .title")
    check("the newest is first", titles.all_inner_texts() == ["Second question", "First question"])
    page.reload()
    page.locator(".answer").wait_for()
    shown = page.locator(".asked").inner_text(), page.locator(".answer .markdown").inner_text()
    check("a reload keeps the conversation", "Second question" in shown[0] and shown[1] == "Second answer.", shown)
    check("without its picture", "red.png (not kept)" in shown[0] and "PNG" not in str(page.evaluate("localStorage")))
    titles.last.click()
    page.locator(".answer strong", has_text="first").wait_for()
    asked = page.locator("#system-shown").is_visible(), page.locator("#system").input_value()
    check("an earlier one opens with its system prompt", asked == (True, "Be brief."), asked)
    check("and its thought", page.locator(".thought p").text_content() == "A thought.")
    with page.expect_request("**/v1/chat/completions") as sent:
        visit.ask("More")
    check("only the last answer is asked for again", page.locator(".again").count() == 1)
    roles = [one["role"] for one in json.loads(sent.value.post_data)["messages"]]
    check("it goes on where it ended", roles == ["system", "user", "assistant", "user"], roles)
    saved = {}
    for kind in ("markdown", "json"):
        with page.expect_download() as download:
            page.click(f"#as-{kind}")
        saved[kind] = download.value.path().read_text(encoding="utf-8")
    messages = json.loads(saved["json"])["messages"]
    check("it is saved as JSON", [one["role"] for one in messages] == [*roles, "assistant"])
    check("and as Markdown", "## You\n\nMore" in saved["markdown"] and "The **first** answer." in saved["markdown"])
    titles.filter(has_text="First question").hover()
    page.get_by_label("Rename First question").click()
    page.keyboard.type("A new name")
    page.keyboard.press("Enter")
    check("renamed", "A new name" in titles.all_inner_texts(), titles.all_inner_texts())
    titles.filter(has_text="A new name").hover()
    page.get_by_label("Delete A new name").click()
    page.locator("#error button", has_text="Undo").wait_for()
    check("deleted", titles.all_inner_texts() == ["Second question"] and page.locator(".answer").count() == 0)
    page.locator("#error button", has_text="Undo").click()
    page.locator(".answer strong", has_text="first").wait_for()
    check("and brought back", "A new name" in titles.all_inner_texts())
    visit.shoot("history")
    _bounds(visit)


def _bounds(visit: Visit) -> None:
    """What another program left in the browser's store harms nothing, and the store has bounds."""
    page = visit.page
    stored = {name: value if isinstance(value, str) else json.dumps(value) for name, value in STORED.items()}
    page.evaluate(STORE, list(stored.items()))
    page.evaluate('localStorage.setItem(\'settings\', \'{"mode": "evil", "system": {"__proto__": 1}}\')')
    page.reload()
    page.locator("#conversations .title", has_text="from __proto__").wait_for()
    for name in ("script", "Conversation"):
        page.locator("#conversations .title", has_text=name).first.click()
    bad = harmless(visit, ".answer, #history li, .asked") + page.evaluate("Object.keys(Object.prototype)")
    check("hostile entries are read as text", not bad, bad)
    entry = json.dumps({"messages": [{"role": "user", "text": "old"}, {"role": "assistant", "text": "x" * 90_000}]})
    page.evaluate(STORE, [(f"old{i}", entry) for i in range(30)])
    page.click("#fresh")
    visit.ask("The newest")
    size = page.evaluate("Object.values(localStorage).reduce((sum, one) => sum + one.length, 0)")
    check("two million characters are kept", 1_800_000 < size < 2_010_000, size)
    page.evaluate(STORE, [(f"many{i}", entry.replace("x" * 90_000, "x")) for i in range(60)])
    page.click("#fresh")
    visit.ask("The very newest")
    titles = page.locator("#conversations .title").all_inner_texts()
    newest = titles[:2] == ["The very newest", "The newest"]
    check("at most 50 conversations, the newest among them", len(titles) == 50 and newest, len(titles))
    page.uncheck("#keep")
    names = page.evaluate("Object.keys(localStorage).filter((name) => name.startsWith('conversation.')).length")
    check("none is kept where that is switched off", names == 0, names)
    page.evaluate("localStorage.clear()")
    page.unroute("**/v1/chat/completions")
    page.reload()
