"""GGUF files convert, reload and compute what their dequantized form computes; what they lack is told."""

import json
import shutil
from pathlib import Path

import gguf_files as files
import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub.utils import filter_repo_objects
from mlx.utils import tree_flatten
from support import gap, random_tokens, refusal, small_config, small_model, square, write_checkpoint

import mlx_dgemma
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.sources import parts
from mlx_dgemma.convert.sources.opened import find_source
from mlx_dgemma.errors import CheckpointError, PromptError

SIZES = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 64, "head_dim": 64}
SIZES |= {"global_head_dim": 64, "vocab_size": 2048, "max_position_embeddings": 512}
CONFIG = small_config(**SIZES)
TEXT_ONLY = "A GGUF file of this model holds no vision tower: the result takes text only, no pictures or video."


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in tree_flatten(small_model(scale=0.1, **SIZES).parameters())}


def logits(path: Path) -> mx.array:
    model = build(Checkpoint.open(path), "float32")
    prefix = model.new_prefix()
    model.encode(random_tokens(0, 1, 7), prefix)
    first = model.logits(model.denoise(random_tokens(1, 1, 4), prefix))
    again = model.denoise(random_tokens(1, 1, 4), prefix, model.condition(first / 0.8))
    return mx.concatenate([first, model.logits(again)])


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K", "Q8_0", "BF16", "F16", "F32"])
def test_a_type_computes_what_its_dequantized_form_computes(weights, tmp_path, monkeypatch, kind):
    file = tmp_path / "model.gguf"
    meaning = files.write_gguf(file, weights, CONFIG, kind, DEMO, apart=kind == "Q8_0")
    monkeypatch.setattr(parts, "SLICE_VALUES", 150 * 256)
    report = convert(file, tmp_path / "out", dtype="float32", verify=kind == "Q4_K")
    assert report.verification is None or report.verification.equal
    assert TEXT_ONLY in report.notes
    found = dict(mx.load(str(tmp_path / "out" / "model.safetensors")))
    assert found.keys() == meaning.keys()
    for name, expected in meaning.items():
        np.testing.assert_allclose(np.array(found[name]), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    plain = write_checkpoint(tmp_path / "plain", {name: mx.array(a) for name, a in meaning.items()}, CONFIG)
    assert gap(logits(tmp_path / "out"), logits(plain)) < 1e-3


def test_the_metadata_become_configuration_and_tokenizer(weights, tmp_path):
    files.write_gguf(tmp_path / "model.gguf", weights, CONFIG, "Q8_0", DEMO)
    (tmp_path / "._model.gguf").write_bytes(b"\0\5\26\7")
    report = convert(tmp_path, tmp_path / "out", "4bit")
    assert report.bits_per_weight < 10
    assert report.dtype == "bfloat16"
    assert "made from the GGUF file's vocabulary" in report.notes[1]
    engine = mlx_dgemma.load(tmp_path / "out", dequantize=False)
    expected = Checkpoint.open(write_checkpoint(tmp_path / "plain", {"x": mx.zeros((1,))}, CONFIG)).config
    assert engine.config.text == expected.text
    assert engine.checkpoint.generation.eos_token_ids == (1, 16, 9)
    assert (engine.options.max_denoising_steps, engine.options.entropy_bound) == (24, 0.2)
    demo = mlx_dgemma.load(DEMO).tokenizer
    assert engine.tokenizer.get_vocab() == demo.get_vocab()
    assert engine.tokenizer.decode(engine.tokenizer.encode("Snow, 3 \u00b0C\n")) == "Snow, 3 \u00b0C\n"
    chat = [{"role": "user", "content": "Hi"}]
    assert engine.tokenizer.apply_chat_template(chat, tokenize=False) == demo.apply_chat_template(chat, tokenize=False)
    with pytest.raises(PromptError, match="vision"):
        engine.generate("What is it?", images=[square("red")], max_tokens=1)


def test_files_beside_it_are_the_tokenizer(weights, tmp_path):
    files.write_gguf(tmp_path / "model.gguf", weights, CONFIG, "Q8_0", None)
    message = refusal(CheckpointError, convert, tmp_path / "model.gguf", tmp_path / "out")
    assert message == (
        f"{tmp_path / 'model.gguf'} holds no vocabulary; put the release's tokenizer.json, tokenizer_config.json and "
        "chat_template.jinja beside it."
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, tmp_path)
    assert convert(tmp_path / "model.gguf", tmp_path / "out").notes == (TEXT_ONLY,)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (DEMO / "tokenizer.json").read_bytes()


def test_what_cannot_be_read_is_named(weights, tmp_path):
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    files.write_gguf(file, weights, CONFIG, "Q8_0", DEMO)
    assert refusal(CheckpointError, mlx_dgemma.load, file) == (
        f"{file} is a GGUF file; convert it first: mlx-dgemma convert {file} --mlx-path NAME -q."
    )
    whole = file.read_bytes()
    shutil.copy(file, tmp_path / "other.gguf")
    assert "holds several GGUF files (model.gguf, other.gguf); give" in refusal(CheckpointError, convert, tmp_path, out)
    for broken, words in (
        (whole[:-40], f"{file} is truncated: it has {len(whole) - 40} of "),
        (whole[:1000], f"{file} is truncated: its header is cut off; "),
        (b"GGML" + whole[4:], f"{file} is not a GGUF file of version 2 or 3; "),
        (b"version https://git-lfs.github.com/spec/v1\n", f"{file} is a git-lfs pointer"),
        (
            whole.replace(b"diffusion-gemma", b"gemma4-long-nam"),
            "the model 'gemma4-long-nam' (the autoreg",
        ),
        (whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"), "holds the unknown tensor blk.1.ffn_uq.weight"),
        (whole.replace(b"output_norm.weight", b"rope_freqs.weight."), "holds the unknown tensor rope_freqs.weight."),
        (whole.replace(b"diffusion.canvas_length", b"diffusion.canvas_lengt_"), "lacks diffusion.canvas_length, which"),
    ):
        file.write_bytes(broken)
        assert words in refusal(CheckpointError, convert, file, out)
    assert not out.exists()
    assert json.loads((DEMO / "config.json").read_text())["vision_config"]  # which a GGUF file has none of


@pytest.mark.parametrize(("asked", "found"), [
    ("some/model-GGUF/a-Q4_K_M.gguf", "a-Q4_K_M.gguf"),
    ("some/model-GGUF:a-Q4_K_M.gguf", "a-Q4_K_M.gguf"),
    ("some/model-GGUF:q4_k_m", "a-Q4_K_M.gguf"),
    ("some/model:Q8_0", "big/a-Q8_0-00001-of-00002.gguf"),
    ("some/model/big/a-Q8_0-00002-of-00002.gguf", "big/a-Q8_0-00001-of-00002.gguf"),
    ("some/model:Q4_K", "some/model:Q4_K stands for one GGUF file, and there is none; give the file's whole name."),
    ("some/model:BF16", "some/model:BF16 stands for one GGUF file, and there is a-BF16.gguf, b-BF16.gguf; "
     "give the file's whole name."),
    ("some/model-GGUF", "some/model-GGUF holds GGUF files; name the one to convert, such as some/model-GGUF:Q4_K_M."),
])  # fmt: skip
def test_a_file_of_the_hub(tmp_path, monkeypatch, asked, found):
    names = ["a-Q4_K_M.gguf", "a-Q4_K_S.gguf", "a-BF16.gguf", "b-BF16.gguf", "mmproj-BF16.gguf", "tokenizer.json"]
    names += [f"big/a-Q8_0-0000{i}-of-00002.gguf" for i in (1, 2)]
    calls = []

    def snapshot(repository, allow_patterns, local_files_only=False):
        calls.append((repository, local_files_only))
        for name in [] if local_files_only else filter_repo_objects(names, allow_patterns=allow_patterns):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    if found.endswith(".gguf"):
        assert find_source(asked) == tmp_path / found
        repository = "some/model-GGUF" if "GGUF" in asked else "some/model"
        assert calls == [(repository, True), (repository, False)]
        assert len([*tmp_path.rglob("*.gguf")]) == 1 + found.startswith("big")  # no more is fetched
        assert find_source(asked) == tmp_path / found and len(calls) == 3
    else:
        assert refusal(CheckpointError, find_source, asked) == found
