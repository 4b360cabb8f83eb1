"""Adapters that PEFT saved: they compute what PEFT computes; files that do not fit are refused."""

import math
import re

import mlx.core as mx
import pytest
from peft_files import BOUND, DOWN, EXPERTS_DOWN, GATE, THEIRS, A, B, Q, array, pair, same, save
from safetensors_files import write_safetensors
from support import DATA, gap, reference, refusal

from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Delta
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError

SAVED = ["peft_patterns", "peft_dora", "peft_experts"]


@pytest.fixture(scope="module")
def shapes():
    return Checkpoint.open(DEMO).shapes


def changed(deltas: dict[str, Delta]):
    """The demo with deltas added to its weights."""
    model = build(Checkpoint.open(DEMO), "float32")
    modules = dict(model.named_modules())
    for path, delta in deltas.items():
        weight = modules[path].weight + delta.scale * (delta.b @ delta.a)
        if delta.magnitude is not None:
            weight = weight * (delta.magnitude / mx.linalg.norm(weight, axis=-1))[:, None]
        modules[path].weight = weight
    return model


def gaps(expected: dict[str, mx.array], encode: dict[str, Delta], denoise: dict[str, Delta]) -> list[float]:
    """Differences of the encoder's hidden states and of two steps' logits from those of Transformers."""
    encoder, decoder = changed(encode), changed(denoise)
    prefix = encoder.new_prefix()
    hidden = encoder.encode(expected["input_ids"], prefix)
    first = decoder.logits(decoder.denoise(expected["canvas"], prefix))
    second = decoder.logits(decoder.denoise(expected["canvas"], prefix, decoder.condition(first / 0.8)))
    return [
        gap(hidden, expected["encoder_hidden"]),
        gap(first[:, ::16], expected["logits"]),
        gap(second[:, ::16], expected["logits_conditioned"]),
    ]


@pytest.mark.parametrize("name", SAVED)
def test_an_adapter_of_peft_computes_what_peft_computes(name, shapes):
    expected, adapter = reference(name), peft.read(DATA / name, shapes)
    assert max(gaps(expected, adapter.encode, adapter.denoise)) < BOUND
    shared = {path: delta for path, delta in adapter.encode.items() if path in adapter.denoise}
    swapped = gaps(expected, adapter.denoise, {**adapter.denoise, **shared})
    assert min(swapped) > 0.1  # the two modes have deltas of their own


def test_ranks_and_scales_follow_the_patterns(shapes):
    adapter = peft.read(DATA / "peft_patterns", shapes)
    modes = {"encode": adapter.encode, "denoise": adapter.denoise}
    found = {
        (mode, path.removeprefix("model.decoder.")): (delta.a.shape[0], delta.scale)
        for mode, deltas in modes.items()
        for path, delta in deltas.items()
    }
    assert len(found) == 2 * (7 + 6) + 3  # a full layer has no v_proj
    assert found["encode", "layers.0.mlp.up_proj"] == (2, 3 / math.sqrt(2))
    assert found["encode", "layers.0.mlp.down_proj"] == (2, 3 / math.sqrt(2))
    assert found["denoise", "layers.0.mlp.down_proj"] == (3, 3 / math.sqrt(3))
    assert found["encode", "layers.0.self_attn.q_proj"] == (1, 3)
    assert found["encode", "layers.5.self_attn.q_proj"] == (1, 5)
    assert found["encode", "layers.5.self_attn.k_proj"] == (2, 5 / math.sqrt(2))
    assert found["denoise", "layers.5.self_attn.k_proj"] == (2, 3 / math.sqrt(2))
    assert found["denoise", "self_conditioning.up_proj"] == (2, 1.5 / math.sqrt(2))


def test_arrays_are_read_as_float32(shapes):
    for name, stored in (("peft_dora", mx.bfloat16), ("peft_experts", mx.float16)):
        expected = mx.load(str(DATA / name / "adapter_model.safetensors"))
        assert {one.dtype for one in expected.values()} == {stored}
        adapter = peft.read(DATA / name, shapes)
        deltas = [*adapter.encode.values(), *adapter.denoise.values()]
        assert {one.dtype for delta in deltas for one in (delta.a, delta.b)} == {mx.float32}
    assert peft.read(DATA / "peft_dora", shapes).encode[DOWN].magnitude.dtype == mx.float32


def test_names_with_and_without_prefix_and_adapter_name(tmp_path, shapes):
    tensors = {**pair("decoder.layers.0.self_attn.q_proj"), f"{THEIRS}.{Q[6:]}.lora_magnitude_vector": array(192)}
    first = peft.read(save(tmp_path, tensors, use_dora=True), shapes)
    assert first.denoise.keys() == {Q}
    for old, new in (
        ("base_model.model.", ""),
        (".weight", ".default.weight"),
        ("magnitude_vector", "magnitude_vector.default.weight"),
        ("magnitude_vector", "magnitude_vector.weight"),
    ):
        renamed = {key.replace(old, new): tensor for key, tensor in tensors.items()}
        again = peft.read(save(tmp_path, renamed, use_dora=True), shapes)
        assert same(again.denoise, first.denoise)


def test_each_modes_names_only_change_that_mode(tmp_path, shapes):
    adapter = peft.read(save(tmp_path, pair("decoder.layers.0.self_attn.q_proj")), shapes)
    assert (adapter.encode, adapter.denoise.keys()) == ({}, {Q})
    adapter = peft.read(save(tmp_path, pair("encoder.language_model.layers.0.self_attn.q_proj")), shapes)
    assert (adapter.encode.keys(), adapter.denoise) == ({Q}, {})


def test_a_single_stack_changes_both_modes(tmp_path, shapes):
    """NeMo AutoModel's names and configuration."""
    tensors = {**pair("layers.0.self_attn.q_proj"), **pair("self_conditioning.gate_proj", 384)}
    names = ["model.layers.0.self_attn.q_proj", "model.self_conditioning.gate_proj"]
    kind = {"task_type": "CAUSAL_LM", "use_dora": False, "bias": "none", "base_model_name_or_path": "N/A"}
    adapter = peft.read(save(tmp_path, tensors, target_modules=names, **kind), shapes)
    assert adapter.encode.keys() == {Q}
    assert adapter.denoise.keys() == {Q, GATE}
    assert same(adapter.encode, {Q: adapter.denoise[Q]})


FIRST = f"{THEIRS}.decoder.layers.0.self_attn.q_proj"
FOREIGN = "The adapter belongs to another model: "
AGAIN = "load it with the model that it was trained on."


@pytest.mark.parametrize(
    ("tensors", "changes", "message"),
    [
        ({}, {}, "{file} contains no tensors; save the adapter again."),
        (
            {f"{FIRST}.lora_embedding_A": (2, 192)},
            {},
            f"{{file}} contains {FIRST}.lora_embedding_A, which is not part of a LoRA; save the adapter without it.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192)},
            {},
            f"The adapter changes model{FIRST[22:]}, but its lora_B is missing; save it again.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.{B}": (192, 2)},
            {"use_dora": True},
            f"The adapter changes model{FIRST[22:]}, but its lora_magnitude_vector is missing; save it again.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.{B}": (192, 2), f"{FIRST}.lora_magnitude_vector": (192,)},
            {},
            f"The adapter contains {FIRST}.lora_magnitude_vector, but adapter_config.json does not set use_dora; "
            "correct one of them.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.lora_A.default.weight": (2, 192)},
            {},
            f"{{file}} contains {FIRST}.lora_A.weight and {FIRST}.lora_A.default.weight, which mean the same; "
            "remove one of them.",
        ),
        (
            {f"{FIRST}.{A}": (2, 64), f"{FIRST}.{B}": (192, 2)},
            {},
            f"{FOREIGN}its {FIRST}.lora_A.weight has the shape [2, 64], but should have [2, 192]; {AGAIN}",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.{B}": (384, 2)},
            {},
            f"{FOREIGN}its {FIRST}.lora_B.weight has the shape [384, 2], but should have [192, 2]; {AGAIN}",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.{B}": (192, 2), f"{FIRST}.lora_magnitude_vector": (64,)},
            {"use_dora": True},
            f"{FOREIGN}its {FIRST}.lora_magnitude_vector has the shape [64], but should have [192]; {AGAIN}",
        ),
        (
            {f"{FIRST}.{A}": (4, 192), f"{FIRST}.{B}": (192, 4)},
            {},
            f"The adapter has another rank than adapter_config.json says: its {FIRST}.lora_A.weight has the shape "
            "[4, 192], but should have [2, 192]; correct one of them.",
        ),
        (
            {f"{THEIRS}.decoder.layers.6.mlp.down_proj.{A}": (2, 384)},
            {},
            f"{FOREIGN}this model has no model.decoder.layers.6.mlp.down_proj to change; {AGAIN}",
        ),
        (
            {f"{THEIRS}.decoder.embed_tokens.{A}": (2, 192)},
            {"target_modules": ["embed_tokens"]},
            f"{FOREIGN}this model has no model.decoder.embed_tokens to change; {AGAIN}",
        ),
        (
            {f"{THEIRS}.decoder.norm.{A}": (2, 192)},
            {"target_modules": ["norm"]},
            f"{FOREIGN}this model has no model.decoder.norm to change; {AGAIN}",
        ),
        (
            {f"{THEIRS}.language_model.layers.0.self_attn.q_proj.{A}": (2, 192)},
            {},
            f"{FOREIGN}this model has no model.language_model.layers.0.self_attn.q_proj to change; {AGAIN}",
        ),
        (
            {
                f"{part}.{one}": shape
                for part in (FIRST, f"{THEIRS}.layers.0.self_attn.q_proj")
                for one, shape in ((A, (2, 192)), (B, (192, 2)))
            },
            {},
            f"{{file}} changes {Q} twice, the second time as model.layers.0.self_attn.q_proj; remove one of them.",
        ),
        (
            {f"{THEIRS}.decoder.layers.2.experts.{A}": (16, 128)},
            {},
            f"{{file}} contains {THEIRS}.decoder.layers.2.experts.lora_A.weight, which adapter_config.json does not "
            "target, so PEFT ignores it; remove it or target it.",
        ),
        (
            {f"{THEIRS}.decoder.layers.2.experts.base_layer.{A}": (16, 192)},
            {"target_parameters": ["experts.gate_up_proj"]},
            f"{{file}} contains {THEIRS}.decoder.layers.2.experts.base_layer.lora_A.weight, which adapter_config.json "
            "does not target, so PEFT ignores it; remove it or target it.",
        ),
        (
            {f"{THEIRS}.decoder.layers.2.experts.{A}": (16, 128)},
            {"target_parameters": ["experts.down_proj"], "use_dora": True},
            f"The adapter changes {EXPERTS_DOWN} with use_dora, which is not supported for experts.",
        ),
        (  # what PEFT before 0.19.1 wrote: in and out the other way round
            {f"{THEIRS}.decoder.layers.2.experts.{A}": (16, 192), f"{THEIRS}.decoder.layers.2.experts.{B}": (128, 16)},
            {"target_parameters": ["experts.down_proj"]},
            f"{FOREIGN}its {THEIRS}.decoder.layers.2.experts.lora_A.weight has the shape [16, 192], but should have "
            f"[16, 128]; {AGAIN}",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, shapes, tensors, changes, message):
    folder = save(tmp_path, {key: array(*shape) for key, shape in tensors.items()}, **changes)
    found = refusal(CheckpointError, peft.read, folder, shapes)
    assert found == message.format(file=folder / "adapter_model.safetensors")


def test_missing_and_broken_files_are_refused(tmp_path, shapes):
    folder = save(tmp_path / "new", pair("decoder.layers.0.self_attn.q_proj"))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    message = f"{weights} is truncated: it has {len(whole) - 4} of {len(whole)} bytes; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == message
    weights.write_bytes(b"PK" + bytes(80))
    message = f"{weights} is truncated: its header is cut off; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == message
    weights.write_bytes((2).to_bytes(8, "little") + b"no")
    message = f"{weights} is not a safetensors file; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == message
    write_safetensors(weights, {"a": ("F32", [4, 4], bytes(16))})
    message = refusal(CheckpointError, peft.read, folder, shapes)
    assert re.fullmatch(rf"{weights} cannot be read \(.*Expecting 64 bytes.*\); download it again\.", message)
    write_safetensors(weights, {f"{FIRST}.{A}": ("F64", [1], bytes(8))})
    message = f"{weights} contains {FIRST}.lora_A.weight as F64; it should be one of F32, BF16, F16."
    assert refusal(CheckpointError, peft.read, folder, shapes) == message
    config.write_text("[]")
    message = f"{config} does not hold a JSON object; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == message
    for file in (weights, config):
        file.unlink()
        message = f"{folder} has no {file.name}; give a folder that contains a PEFT adapter."
        assert refusal(CheckpointError, peft.read, folder, shapes) == message
