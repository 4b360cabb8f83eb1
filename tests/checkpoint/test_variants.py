"""Checkpoints as they are found: each variant loads, with a note where something is not used, or names its remedy."""

import codecs
import json
import shutil
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from support import refusal, small_model, write_checkpoint

from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.checkpoint.headers import INDEX
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.errors import CheckpointError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4958443072\n"
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
EMBEDDING = "model.decoder.embed_tokens.weight"
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A complete checkpoint in two shards with an index."""
    tensors = dict(tree_flatten(small_model().parameters()))
    folder = write_checkpoint(tmp_path_factory.mktemp("plain") / "model", tensors, shards=2)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    return folder


def edit(file: Path, *path: str, **changes) -> None:
    whole = json.loads(file.read_text())
    part = whole
    for key in path:
        part = part[key]
    part.update(changes)
    file.write_text(json.dumps(whole))


def apple_double(p: Path) -> None:
    for file in list(p.iterdir()):
        (p / f"._{file.name}").write_bytes(b"\0\5\26\7" + bytes(60))


def one_file(p: Path) -> None:
    tensors = {name: array for shard in (FIRST, SECOND) for name, array in mx.load(str(p / shard)).items()}
    mx.save_safetensors(str(p / "model.safetensors"), tensors)
    for name in (FIRST, SECOND, INDEX):
        (p / name).unlink()


def tied(p: Path) -> None:
    names = {"lm_head.weight": FIRST, "model.encoder.language_model.embed_tokens.weight": SECOND}
    edit(p / INDEX, "weight_map", **names)


def moved_template(p: Path) -> None:
    template = (p / "chat_template.jinja").read_text()
    (p / "chat_template.jinja").unlink()
    (p / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def marked(*names: str):
    def change(p: Path) -> None:
        for name in names:
            (p / name).write_bytes(codecs.BOM_UTF8 + (p / name).read_bytes())

    return change


def config(*path: str, **changes):
    return lambda p: edit(p / "config.json", *path, **changes)


def generation(**changes):
    return lambda p: edit(p / "generation_config.json", **changes)


def both(*changes):
    return lambda p: [change(p) for change in changes]


def stray(name: str):
    return lambda p: mx.save_safetensors(str(p / name), {"x": mx.zeros((1,))})


# {variant: (what makes it, its note or None)}
LOADED = {
    "AppleDouble files": (apple_double, None),
    "AppleDouble files, no index": (both(one_file, apple_double), None),
    "a stray file beside an index": (
        stray("consolidated.safetensors"),
        f"consolidated.safetensors is not in {INDEX} and not read.",
    ),
    "an adapter beside one file": (
        both(one_file, stray("adapter_model.safetensors")),
        "adapter_model.safetensors is not one of the shards and not read.",
    ),
    "shards without an index": (lambda p: (p / INDEX).unlink(), None),
    "an index that names tied tensors": (tied, None),
    "a template in chat_template.json": (moved_template, None),
    "an index with a byte order mark": (marked(INDEX), None),
    "byte order marks": (
        marked("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
        None,
    ),
    "a template with a byte order mark": (marked("chat_template.jinja"), None),
    "UTF-16": (lambda p: (p / "config.json").write_text((p / "config.json").read_text(), "utf-16"), None),
    "Unsloth's keys": (
        config(
            unsloth_version="2026.6.1", unsloth_fixed=True, model_name="unsloth/diffusiongemma", torch_dtype="bfloat16"
        ),
        "config.json: 'model_name', 'unsloth_fixed', 'unsloth_version' change nothing here.",
    ),
    "NeMo's keys": (
        config("text_config", nemo_version="2.8", gradient_checkpointing=True, router_aux_loss_coef=0.001),
        "config.json (text_config): 'gradient_checkpointing', 'nemo_version', 'router_aux_loss_coef' "
        "change nothing here.",
    ),
    "older Transformers' keys": (
        config("text_config", pruned_heads={}, tie_encoder_decoder=False, torchscript=False, sep_token_id=3),
        "config.json (text_config): 'pruned_heads', 'sep_token_id', 'tie_encoder_decoder', 'torchscript' "
        "change nothing here.",
    ),
    "an unknown feature that is off": (
        config("text_config", attention_sinks=0),
        "config.json (text_config): 'attention_sinks' change nothing here.",
    ),
    "sampling keys": (
        generation(do_sample=True, temperature=1.0, top_k=64, top_p=0.95),
        "generation_config.json: 'do_sample', 'temperature', 'top_k', 'top_p' are settings of other samplers "
        "and are not used; give options instead.",
    ),
    "a tower in config.json alone": (
        config(vision_config=VISION),
        "config.json has a vision_config, but no file holds the tower: text only, no pictures.",
    ),
    "an exporter's keys in the processor's settings": (
        lambda p: (p / "preprocessor_config.json").write_text('{"unsloth_version": "2026.6"}'),
        "preprocessor_config.json: 'unsloth_version' change nothing here.",
    ),
}


@pytest.fixture
def variant(plain, tmp_path) -> Path:
    return shutil.copytree(plain, tmp_path / "model")


@pytest.fixture(scope="module")
def whole(plain):
    """What the untouched checkpoint gives: the embedding and the prompt."""
    return opened(plain)[1:]


def opened(path: Path):
    checkpoint = Checkpoint.open(path)
    prompt = load_tokenizer(checkpoint).apply_chat_template([{"role": "user", "content": "Hi"}])
    return checkpoint, build(checkpoint).model.decoder.embed_tokens.weight, prompt


@pytest.mark.parametrize("case", LOADED)
def test_a_variant_loads_like_the_original(variant, whole, case):
    change, note = LOADED[case]
    change(variant)
    checkpoint, embedding, prompt = opened(variant)
    assert checkpoint.notes == (() if note is None else (note,))
    assert mx.array_equal(embedding, whole[0])
    assert prompt == whole[1]


def pointer(name: str):
    return lambda p: (p / name).write_bytes(POINTER)


LFS = " is a git-lfs pointer, not the file itself; run `git lfs install` and `git lfs pull` in its folder."
REFUSED = {
    "a pointer for a shard": (pointer(SECOND), "{p}/" + SECOND + LFS),
    "a pointer for the index": (pointer(INDEX), "{p}/" + INDEX + LFS),
    "a pointer for the tokenizer": (pointer("tokenizer.json"), "{p}/tokenizer.json" + LFS),
    "a missing shard, no index": (
        lambda p: [(p / name).unlink() for name in (FIRST, INDEX)],
        "The shard {p}/" + FIRST + " is missing; download it again.",
    ),
    "two sets of weights, no index": (
        both(lambda p: (p / INDEX).unlink(), stray("model.safetensors")),
        "{p} has no " + INDEX + " and holds the weights of model-*-of-00002 and of model; remove all but one.",
    ),
    "a tensor in two shards": (
        both(lambda p: (p / INDEX).unlink(), lambda p: mx.save_safetensors(str(p / SECOND), mx.load(str(p / FIRST)))),
        "{p}/" + FIRST + " and {p}/" + SECOND + " both hold " + EMBEDDING + "; remove the stray one.",
    ),
    "unnumbered files, no index": (
        both(one_file, lambda p: (p / "model.safetensors").rename(p / "a.safetensors"), stray("b.safetensors")),
        "{p} holds 2 shards but no " + INDEX + "; download the index.",
    ),
    "an unknown feature": (
        config("text_config", attention_sinks=4),
        "config.json (text_config) has the unknown key 'attention_sinks' = 4, which may change the computation; "
        "remove it if you know that it does not.",
    ),
    "GGUF alone": (
        lambda p: [file.rename(p / f"{file.stem}.gguf") for file in list(p.glob("*.safetensors*"))],
        "{p} holds no .safetensors file; convert its GGUF file first: mlx-dgemma convert FILE.gguf --mlx-path NAME -q.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_variant_is_refused_with_its_remedy(variant, case):
    change, message = REFUSED[case]
    change(variant)
    if case == "GGUF alone":
        (variant / INDEX).unlink(missing_ok=True)
    assert refusal(CheckpointError, opened, variant) == message.replace("{p}", str(variant))
