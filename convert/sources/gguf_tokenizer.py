"""The tokenizer of a GGUF file as the files that Transformers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_dgemma.checkpoint.tokenizer import FILES
from mlx_dgemma.errors import CheckpointError

from .gguf_file import GGUF

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # token types
_SPACE = "▁"
# Names of tokenizer_config.json for tokens of the vocabulary.
_NAMED = {
    "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>", "audio_token": "<|audio|>",
    "boa_token": "<|audio>", "eoa_token": "<audio|>", "sot_token": "<|turn>", "eot_token": "<turn|>",
    "soc_token": "<|channel>", "eoc_token": "<channel|>", "stc_token": "<|tool_call>", "etc_token": "<tool_call|>",
    "escape_token": '<|"|>', "think_token": "<|think|>", "mask_token": "<mask>",
}  # fmt: skip
_IDS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_USUAL = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}


def write_tokenizer(source: GGUF, folder: Path) -> list[str]:
    """Write tokenizer.json, tokenizer_config.json and the chat template; returns notes.

    Files beside the GGUF file are taken first, for they are the release's own.

    Raises:
        CheckpointError: neither the file nor its folder has a vocabulary.
    """
    meta = source.metadata
    beside = [source.path.parent / name for name in FILES if name != "config.json"]
    for file in beside:
        if file.exists():
            (folder / file.name).write_bytes(file.read_bytes())
    if (template := meta.get("tokenizer.chat_template")) and not (folder / "chat_template.jinja").exists():
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    if (folder / "tokenizer.json").exists():
        return []
    if not (tokens := meta.get("tokenizer.ggml.tokens")):
        raise CheckpointError(
            f"{source.path} holds no vocabulary; put the release's tokenizer.json, tokenizer_config.json and "
            "chat_template.jinja beside it."
        )
    whole = meta.get("tokenizer.huggingface.json")
    (folder / "tokenizer.json").write_text(whole or json.dumps(_tokenizer(meta, tokens)), encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        (folder / "tokenizer_config.json").write_text(json.dumps(_settings(meta, tokens)), encoding="utf-8")
    made = "tokenizer.json is made from the GGUF file's vocabulary; the release's own beside the file would be taken."
    return [] if whole else [made]


def _tokenizer(meta: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer.json: Gemma's byte-pair encoding, blanks as `▁`, unknown characters as bytes."""
    kinds = meta.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    added = [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind != _USER or (token.startswith("<") and "|" in token),
        }
        for i, (token, kind) in enumerate(zip(tokens, kinds))
        if kind in (_UNKNOWN, _CONTROL, _USER)
    ]
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": replaced,
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _token(meta, tokens, "unk_token"),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in meta.get("tokenizer.ggml.merges", ())],
        },
    }


def _settings(meta: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json."""
    known = set(tokens)
    return {
        "tokenizer_class": "GemmaTokenizer",
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **{key: found for key in _IDS if (found := _token(meta, tokens, key))},
        **{key: token for key, token in _NAMED.items() if token in known},
    }


def _token(meta: dict[str, Any], tokens: list[str], key: str) -> str | None:
    """A special token by its id in the metadata, else by its usual name."""
    i = meta.get(f"tokenizer.ggml.{_IDS[key]}_token_id")
    if isinstance(i, int) and i < len(tokens):
        return tokens[i]
    return _USUAL[key] if _USUAL[key] in tokens else None
