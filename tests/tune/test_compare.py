"""Comparison with an autoregressive model: a tiny Llama of random weights, made here, answers through mlx-lm."""

import json
import re
import shutil
from html.parser import HTMLParser

import mlx.core as mx
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs

from mlx_dgemma.cli import main
from mlx_dgemma.tune.compare import Contestant, Reply
from mlx_dgemma.tune.page import page

SIZES = {
    "model_type": "llama", "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6, "vocab_size": 1792,
    "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(demo, tmp_path_factory):
    """With the demo's tokenizer and template."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo / name, folder / name)
    sizes = {**SIZES, "vocab_size": json.loads((demo / "config.json").read_text())["text_config"]["vocab_size"]}
    mx.random.seed(0)
    model = Model(ModelArgs.from_dict(sizes))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps({**sizes, "eos_token_id": 1}))
    return folder


class Checked(HTMLParser):
    """Whether tags are balanced, and which there are."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.attributes = [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_command_compares_every_mode_with_the_other_model(llama, tmp_path):
    data = tmp_path / "test.jsonl"
    lines = [{"prompt": "Spell the word frog.", "completion": "f r o g"}, {"prompt": "<b>&", "completion": "x"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    html, told = tmp_path / "page.html", tmp_path / "told.jsonl"
    arguments = ["evaluate", str(data), "--against", str(llama), "--html", str(html), "--max-tokens", "8"]
    run = CliRunner().invoke(main.main, [*arguments, "--output", str(told)], catch_exceptions=False)
    assert run.exit_code == 0, run.output
    head, *rows = run.stdout.splitlines()
    assert head.split()[:4] == ["right", "of", "share", "95"]
    assert [row.split()[0] for row in rows] == ["diffusion", "causal", "speculative", str(llama)]
    assert [row.split()[1] for row in rows] == ["1", "1", "1", "0"]
    first, second = (json.loads(line) for line in told.read_text().splitlines())
    assert first["answers"]["causal"]["text"] == first["answers"]["speculative"]["text"] == "f r o g"
    assert second["expected"] == "x" and 0 < second["answers"][str(llama)]["tokens"] <= 8
    text = html.read_text()
    assert "&lt;b&gt;&amp;" in text and "<b>&" not in text and "prefers-color-scheme: dark" in text
    again = CliRunner().invoke(main.main, arguments)
    assert again.exit_code == 1 and "exists already" in again.stderr
    missing = CliRunner().invoke(main.main, ["evaluate", str(data), "--against", str(tmp_path / "none")])
    assert missing.exit_code == 1 and "does not exist" in missing.stderr
    alone = CliRunner().invoke(main.main, ["evaluate", str(data), "--html", "x.html"])
    assert alone.exit_code == 2 and "--against" in alone.stderr


def test_the_page_is_whole_and_escapes_everything():
    evil = "<script>alert('1')</script>\"&"
    replies = [Reply(evil, 0.5, 3, 0.2, 0.1, 2**30, "length"), Reply("", 1.0, 0, 0.0, 0.0, 0, "stop")]
    made = page(evil, [Contestant(evil, replies), Contestant("b", replies[::-1])], [(evil, evil, evil)] * 2)
    checked = Checked()
    checked.feed(made)
    assert not checked.open and {"svg", "table", "figure"} <= checked.seen and "script" not in checked.seen
    assert not [name for name, _ in checked.attributes if name in ("src", "href") or name.startswith("on")]
    assert made.count("<svg") == 5 and not re.search(r"https?://", made)
    figures = Contestant("b", replies).figures()
    assert figures["right"] == 1.5 and figures["tokens_per_second"] == 15 and figures["peak_memory"] == 2**30
