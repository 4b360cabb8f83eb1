"""PEFT's layout: what it saved is read and computes the same, what is written is read again, the rest is refused."""

import json
import math
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_safetensors
from support import DATA, gap, reference, refusal

from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError

BOUND = 1e-4
SAVED = ["peft_patterns", "peft_dora", "peft_experts"]
THEIRS = "base_model.model.model"
Q = "model.decoder.layers.0.self_attn.q_proj"  # [192, 192]
DOWN = "model.decoder.layers.1.mlp.down_proj"  # [192, 384]
GATE_UP = "model.decoder.layers.2.experts.gate_up_proj"  # [8, 256, 192]
EXPERTS_DOWN = "model.decoder.layers.2.experts.down_proj"  # [8, 192, 128]
GATE = "model.decoder.self_conditioning.gate_proj"  # [384, 192]
SIGHT = "model.encoder.vision_tower.encoder.layers.1.self_attn.v_proj.linear"  # [96, 96]
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj", "gate_proj"]}
A, B = "lora_A.weight", "lora_B.weight"


@pytest.fixture(scope="module")
def shapes():
    return Checkpoint.open(DEMO).shapes


def array(*shape: int, seed: int = 0) -> mx.array:
    return mx.array(np.random.default_rng((seed, *shape)).normal(size=shape).astype(np.float32))


def pair(module: str, out: int = 192, inputs: int = 192, rank: int = 2) -> dict[str, mx.array]:
    """The tensors of a module's LoRA, as PEFT names them."""
    return {f"{THEIRS}.{module}.{A}": array(rank, inputs), f"{THEIRS}.{module}.{B}": array(out, rank)}


def save(folder: Path, tensors: dict[str, mx.array], **changes) -> Path:
    """A folder in PEFT's layout; None takes a key out of the configuration."""
    folder.mkdir(exist_ok=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "adapter_model.safetensors"), tensors)
    return folder


def same(a: dict[str, Delta], b: dict[str, Delta]) -> bool:
    """Whether all paths, arrays and factors are exactly the same."""
    pairs = [(a[path], b[path]) for path in a if path in b]
    return a.keys() == b.keys() and all(
        one.scale == other.scale
        and mx.array_equal(one.a, other.a).item()
        and mx.array_equal(one.b, other.b).item()
        and (one.magnitude is None) == (other.magnitude is None)
        and (one.magnitude is None or mx.array_equal(one.magnitude, other.magnitude).item())
        for one, other in pairs
    )


def changed(deltas: dict[str, Delta]):
    """The demo with deltas in its weights."""
    model = build(Checkpoint.open(DEMO), "float32")
    modules = dict(model.named_modules())
    for path, delta in deltas.items():
        weight = modules[path].weight + delta.scale * (delta.b @ delta.a)
        if delta.magnitude is not None:
            weight = weight * (delta.magnitude / mx.linalg.norm(weight, axis=-1))[:, None]
        modules[path].weight = weight
    return model


def gaps(held: dict[str, mx.array], encode: dict[str, Delta], denoise: dict[str, Delta]) -> list[float]:
    """How far the encoder's hidden states and two steps' logits are from Transformers'."""
    encoder, decoder = changed(encode), changed(denoise)
    prefix = encoder.new_prefix()
    hidden = encoder.encode(held["input_ids"], prefix)
    first = decoder.logits(decoder.denoise(held["canvas"], prefix))
    second = decoder.logits(decoder.denoise(held["canvas"], prefix, decoder.condition(first / 0.8)))
    return [
        gap(hidden, held["encoder_hidden"]),
        gap(first[:, ::16], held["logits"]),
        gap(second[:, ::16], held["logits_conditioned"]),
    ]


@pytest.mark.parametrize("name", SAVED)
def test_what_peft_saved_computes_what_peft_computes(name, shapes):
    held, adapter = reference(name), peft.read(DATA / name, shapes)
    assert max(gaps(held, adapter.encode, adapter.denoise)) < BOUND
    shared = {path: delta for path, delta in adapter.encode.items() if path in adapter.denoise}
    swapped = gaps(held, adapter.denoise, {**adapter.denoise, **shared})
    assert min(swapped) > 0.1  # the two modes have deltas of their own


def test_ranks_and_factors_follow_the_patterns(shapes):
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


def test_arrays_are_float32_whatever_was_stored(shapes):
    for name, stored in (("peft_dora", mx.bfloat16), ("peft_experts", mx.float16)):
        held = mx.load(str(DATA / name / "adapter_model.safetensors"))
        assert {one.dtype for one in held.values()} == {stored}
        adapter = peft.read(DATA / name, shapes)
        deltas = [*adapter.encode.values(), *adapter.denoise.values()]
        assert {one.dtype for delta in deltas for one in (delta.a, delta.b)} == {mx.float32}
    assert peft.read(DATA / "peft_dora", shapes).encode[DOWN].magnitude.dtype == mx.float32


def delta(shapes, path: str, rank: int = 2, scale: float = 2.0, dora: bool = False, seed: int = 0) -> Delta:
    *experts, out, inputs = shapes[f"{path}.weight"]
    a, b = array(*experts, rank, inputs, seed=seed), array(*experts, out, rank, seed=seed)
    return Delta(a, b, scale, array(out, seed=seed) if dora else None)


def adapters(shapes) -> dict[str, Adapter]:
    def some(*paths: str, seed: int = 0, **kind) -> dict[str, Delta]:
        return {path: delta(shapes, path, seed=seed, **kind) for path in paths}

    shared = some(Q, DOWN)
    ranks = {Q: delta(shapes, Q, 1, 0.7), DOWN: delta(shapes, DOWN, 3, 5 / 3), GATE: delta(shapes, GATE, 7, 2**-0.5)}
    return {
        "shared": Adapter(shared, shared),
        "one mode": Adapter({}, some(Q)),
        "a delta for each mode": Adapter(some(Q, DOWN), some(Q, GATE, seed=1)),
        "ranks and factors": Adapter(some(Q, DOWN, rank=3, scale=1 / 3), ranks),
        "DoRA": Adapter(some(Q, dora=True), some(Q, GATE, seed=1, dora=True)),
        "experts": Adapter(some(GATE_UP, EXPERTS_DOWN), some(Q, GATE_UP, EXPERTS_DOWN, rank=3, seed=1)),
        "one parameter of experts": Adapter(some(GATE_UP), some(EXPERTS_DOWN)),
        "vision": Adapter(some(SIGHT, "model.encoder.embed_vision.embedding_projection"), some(Q)),
    }


def test_what_is_written_is_read_as_it_was(tmp_path, shapes):
    for name, adapter in adapters(shapes).items():
        peft.write(adapter, tmp_path / "new" / name, "a/b")
        found = peft.read(tmp_path / "new" / name, shapes)
        assert same(found.encode, adapter.encode), name
        assert same(found.denoise, adapter.denoise), name


@pytest.mark.parametrize("name", SAVED)
def test_what_peft_saved_is_written_again_without_loss(name, tmp_path, shapes):
    adapter = peft.read(DATA / name, shapes)
    peft.write(adapter, tmp_path, "a/b")
    found = peft.read(tmp_path, shapes)
    assert same(found.encode, adapter.encode)
    assert same(found.denoise, adapter.denoise)


def test_factors_survive():
    """Alpha over the rank to the last bit, over its root to the last but one; whole numbers stay whole."""
    for rank in range(1, 70):
        for alpha in (*range(1, 70), 128, 256):
            assert peft._alpha(alpha / rank, rank) == alpha
            scale = alpha / math.sqrt(rank)
            assert peft._alpha(scale, rank) / rank == pytest.approx(scale, rel=3e-16, abs=0)


def test_the_configuration_names_what_has_deltas_and_no_more(tmp_path, shapes):
    held = adapters(shapes)
    encode = {**held["ranks and factors"].encode, SIGHT: delta(shapes, SIGHT, 3, 1 / 3)}
    peft.write(Adapter(encode, {GATE_UP: delta(shapes, GATE_UP, 3, 0.5)}), tmp_path, "google/diffusiongemma-26B-A4B-it")
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": "google/diffusiongemma-26B-A4B-it",
        "inference_mode": True,
        "bias": "none",
        "use_dora": False,
        "r": 3,
        "lora_alpha": 1,
        "rank_pattern": {},
        "alpha_pattern": {r"model\.decoder\.layers\.2\.experts\.gate_up_proj": 1.5},
        "target_modules": [
            "model.encoder.language_model.layers.0.self_attn.q_proj",
            "model.encoder.language_model.layers.1.mlp.down_proj",
            SIGHT,
        ],
        "target_parameters": [GATE_UP],
    }
    keys = mx.load(str(tmp_path / "adapter_model.safetensors")).keys()
    assert f"{THEIRS}.decoder.layers.2.experts.{A}" in keys
    assert len(keys) == 8
    peft.write(held["experts"], tmp_path, "a/b")
    held = mx.load(str(tmp_path / "adapter_model.safetensors"))
    experts = f"{THEIRS}.encoder.language_model.layers.2.experts"
    assert held[f"{experts}.base_layer.{A}"].shape == (8 * 2, 192)
    assert held[f"{experts}.{B}"].shape == (192, 8 * 2)


def test_an_adapter_in_the_folder_is_replaced_whole_or_not_at_all(tmp_path, shapes, monkeypatch):
    held = adapters(shapes)
    peft.write(held["DoRA"], tmp_path, "a/b")
    peft.write(held["one mode"], tmp_path, "a/b")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(file, *_):
        Path(file).write_bytes(b"half")
        raise RuntimeError("disk full")

    monkeypatch.setattr(mx, "save_safetensors", full)
    with pytest.raises(RuntimeError):
        peft.write(held["shared"], tmp_path, "a/b")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_names_come_with_or_without_peft_and_the_adapters_name(tmp_path, shapes):
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


def test_the_decoders_names_alone_change_denoising_alone(tmp_path, shapes):
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


@pytest.mark.parametrize(
    ("changes", "read"),
    [
        ({"target_modules": ["self_attn.q_proj"]}, True),
        ({"target_modules": [Q]}, True),
        ({"target_modules": ["proj"]}, False),
        ({"target_modules": r".*\.q_proj"}, True),
        ({"target_modules": "q_proj"}, False),
        ({"target_modules": "all-linear"}, True),
        ({"target_modules": None}, False),
        ({"exclude_modules": ".*(vision_tower|embed_vision).*"}, True),
        ({"exclude_modules": ".*decoder.*"}, False),
        ({"exclude_modules": ["q_proj"]}, False),
        ({"layers_to_transform": 0}, True),
        ({"layers_to_transform": [1, 2]}, False),
        ({"layers_to_transform": []}, True),
        ({"layers_to_transform": [0], "layers_pattern": "layers"}, True),
        ({"layers_to_transform": [0], "layers_pattern": ["blocks", "h"]}, False),
    ],
)
def test_only_what_peft_would_change_is_read(tmp_path, shapes, changes, read):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **changes)
    if read:
        assert peft.read(folder, shapes).denoise.keys() == {Q}
    else:
        assert refusal(CheckpointError, peft.read, folder, shapes) == (
            f"{folder}/adapter_model.safetensors holds {THEIRS}.decoder.layers.0.self_attn.q_proj.lora_A.weight, which "
            "adapter_config.json does not target, so PEFT leaves it out; remove it or target it."
        )


def test_notes_and_settings_that_change_nothing_are_accepted(tmp_path, shapes):
    tensors = pair("decoder.layers.0.self_attn.q_proj")
    plain = peft.read(save(tmp_path, tensors), shapes)
    kind = {"lora_dropout": 0.1, "peft_version": "9.9", "revision": "main", "inference_mode": False}
    kind |= {"ensure_weight_tying": True, "megatron_core": "megatron.core", "qalora_group_size": 16, "bias": "none"}
    kind |= {
        "use_qalora": False,
        "loftq_config": {},
        "a_later_switch": False,
        "a_later_list": [],
        "eva_config": {"r": 1},
    }
    for start in (True, False, "gaussian", "orthogonal", "eva", "mica"):
        read = peft.read(save(tmp_path, tensors, init_lora_weights=start, **kind), shapes)
        assert same(read.denoise, plain.denoise)


OTHERS = {
    "bias": "all",
    "fan_in_fan_out": True,
    "modules_to_save": ["lm_head"],
    "lora_bias": True,
    "trainable_token_indices": [1, 2],
    "layer_replication": [[0, 4], [2, 5]],
    "megatron_config": {"tp": 2},
    "alora_invocation_tokens": [7],
    "use_qalora": True,
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3},
    "velora_config": {"scale": 1.0},
    "kasa_config": {"beta": 0.1},
    "monteclora_config": {"num_samples": 4},
    "a_later_switch": "on",
    "init_lora_weights": "pissa_niter_4",
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_changes_the_computation_is_refused(tmp_path, shapes, key):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **{key: OTHERS[key]})
    assert refusal(CheckpointError, peft.read, folder, shapes) == (
        f"{folder}/adapter_config.json sets {key} to {json.dumps(OTHERS[key])}, which cannot be honoured; "
        "train or export the adapter without it."
    )


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(tmp_path, shapes, start):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), init_lora_weights=start)
    assert refusal(CheckpointError, peft.read, folder, shapes) == (
        f'{folder}/adapter_config.json sets init_lora_weights to "{start}", which cannot be honoured; '
        "train or export the adapter without it."
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOHA"}, "has the peft_type 'LOHA'; only LORA can be read."),
        ({"peft_type": None}, "has the peft_type None; only LORA can be read."),
        ({"r": 0}, "sets r to 0; it should be a whole number of at least 1."),
        ({"r": True}, "sets r to true; it should be a whole number of at least 1."),
        ({"lora_alpha": "16"}, 'sets lora_alpha to "16"; it should be a number.'),
        ({"lora_alpha": math.inf}, "sets lora_alpha to Infinity; it should be a number."),
        ({"rank_pattern": ["q"]}, 'sets rank_pattern to ["q"]; it should be an object of names and numbers.'),
        ({"rank_pattern": {"q": 2.5}}, "sets rank_pattern's q to 2.5; it should be a whole number of at least 1."),
        ({"alpha_pattern": {"q": [1]}}, "sets alpha_pattern's q to [1]; it should be a number."),
        ({"use_dora": "no"}, 'sets use_dora to "no"; it should be true or false.'),
        ({"target_modules": {"q": 1}}, 'sets target_modules to {"q": 1}; it should be a list of names or a pattern.'),
        ({"exclude_modules": [1]}, "sets exclude_modules to [1]; it should be a list of names or a pattern."),
        ({"target_parameters": "a.b"}, 'sets target_parameters to "a.b"; it should be a list of names.'),
        ({"layers_to_transform": ["0"]}, 'sets layers_to_transform to ["0"]; it should be a list of numbers.'),
        (
            {"target_modules": "(q"},
            'sets target_modules to "(q"; it should be a regular expression '
            "(missing ), unterminated subpattern at position 0).",
        ),
    ],
)
def test_values_of_the_wrong_kind_are_refused(tmp_path, shapes, changes, told):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **changes)
    assert refusal(CheckpointError, peft.read, folder, shapes) == f"{folder}/adapter_config.json {told}"


FIRST = f"{THEIRS}.decoder.layers.0.self_attn.q_proj"
FOREIGN = "The adapter is for another model: "
AGAIN = "load it with the model that it was trained on."


@pytest.mark.parametrize(
    ("tensors", "changes", "told"),
    [
        ({}, {}, "{file} holds no tensor; save the adapter again."),
        (
            {f"{FIRST}.lora_embedding_A": (2, 192)},
            {},
            f"{{file}} holds {FIRST}.lora_embedding_A, which is no part of a LoRA; save the adapter without it.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192)},
            {},
            f"The adapter changes model{FIRST[22:]}, but lacks its lora_B; save it again.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.{B}": (192, 2)},
            {"use_dora": True},
            f"The adapter changes model{FIRST[22:]}, but lacks its lora_magnitude_vector; save it again.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.{B}": (192, 2), f"{FIRST}.lora_magnitude_vector": (192,)},
            {},
            f"The adapter holds {FIRST}.lora_magnitude_vector, but adapter_config.json does not set use_dora; "
            "correct either.",
        ),
        (
            {f"{FIRST}.{A}": (2, 192), f"{FIRST}.lora_A.default.weight": (2, 192)},
            {},
            f"{{file}} holds {FIRST}.lora_A.weight and {FIRST}.lora_A.default.weight, which are the same; "
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
            "[4, 192], but should have [2, 192]; correct either.",
        ),
        (
            {f"{THEIRS}.decoder.layers.6.mlp.down_proj.{A}": (2, 384)},
            {},
            f"{FOREIGN}this one has no model.decoder.layers.6.mlp.down_proj to change; {AGAIN}",
        ),
        (
            {f"{THEIRS}.decoder.embed_tokens.{A}": (2, 192)},
            {"target_modules": ["embed_tokens"]},
            f"{FOREIGN}this one has no model.decoder.embed_tokens to change; {AGAIN}",
        ),
        (
            {f"{THEIRS}.decoder.norm.{A}": (2, 192)},
            {"target_modules": ["norm"]},
            f"{FOREIGN}this one has no model.decoder.norm to change; {AGAIN}",
        ),
        (
            {f"{THEIRS}.language_model.layers.0.self_attn.q_proj.{A}": (2, 192)},
            {},
            f"{FOREIGN}this one has no model.language_model.layers.0.self_attn.q_proj to change; {AGAIN}",
        ),
        (
            {
                f"{part}.{one}": shape
                for part in (FIRST, f"{THEIRS}.layers.0.self_attn.q_proj")
                for one, shape in ((A, (2, 192)), (B, (192, 2)))
            },
            {},
            f"{{file}} changes {Q} twice, as model.layers.0.self_attn.q_proj too; remove one of them.",
        ),
        (
            {f"{THEIRS}.decoder.layers.2.experts.{A}": (16, 128)},
            {},
            f"{{file}} holds {THEIRS}.decoder.layers.2.experts.lora_A.weight, which adapter_config.json does not "
            "target, so PEFT leaves it out; remove it or target it.",
        ),
        (
            {f"{THEIRS}.decoder.layers.2.experts.base_layer.{A}": (16, 192)},
            {"target_parameters": ["experts.gate_up_proj"]},
            f"{{file}} holds {THEIRS}.decoder.layers.2.experts.base_layer.lora_A.weight, which adapter_config.json "
            "does not target, so PEFT leaves it out; remove it or target it.",
        ),
        (
            {f"{THEIRS}.decoder.layers.2.experts.{A}": (16, 128)},
            {"target_parameters": ["experts.down_proj"], "use_dora": True},
            f"The adapter changes {EXPERTS_DOWN} under use_dora, which is not defined for experts.",
        ),
        (  # what PEFT before 0.19.1 wrote: in and out the other way round
            {f"{THEIRS}.decoder.layers.2.experts.{A}": (16, 192), f"{THEIRS}.decoder.layers.2.experts.{B}": (128, 16)},
            {"target_parameters": ["experts.down_proj"]},
            f"{FOREIGN}its {THEIRS}.decoder.layers.2.experts.lora_A.weight has the shape [16, 192], but should have "
            f"[16, 128]; {AGAIN}",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, shapes, tensors, changes, told):
    folder = save(tmp_path, {key: array(*shape) for key, shape in tensors.items()}, **changes)
    message = refusal(CheckpointError, peft.read, folder, shapes)
    assert message == told.format(file=folder / "adapter_model.safetensors")


def test_missing_and_broken_files_are_refused(tmp_path, shapes):
    folder = save(tmp_path / "new", pair("decoder.layers.0.self_attn.q_proj"))
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    told = f"{weights} is truncated: it has {len(whole) - 4} of {len(whole)} bytes; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == told
    weights.write_bytes(b"PK" + bytes(80))
    told = f"{weights} is truncated: its header is cut off; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == told
    weights.write_bytes((2).to_bytes(8, "little") + b"no")
    told = f"{weights} is not a safetensors file; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == told
    write_safetensors(weights, {"a": ("F32", [4, 4], bytes(16))})
    told = refusal(CheckpointError, peft.read, folder, shapes)
    assert re.fullmatch(rf"{weights} cannot be read \(.*Expecting 64 bytes.*\); download it again\.", told)
    write_safetensors(weights, {f"{FIRST}.{A}": ("F64", [1], bytes(8))})
    told = f"{weights} holds {FIRST}.lora_A.weight as F64; it should be one of F32, BF16, F16."
    assert refusal(CheckpointError, peft.read, folder, shapes) == told
    config.write_text("[]")
    told = f"{config} does not hold a JSON object; download it again."
    assert refusal(CheckpointError, peft.read, folder, shapes) == told
    for file in (weights, config):
        file.unlink()
        told = f"{folder} has no {file.name}; point at a folder that holds a PEFT adapter."
        assert refusal(CheckpointError, peft.read, folder, shapes) == told


def test_what_peft_has_no_place_for_is_not_written(tmp_path, shapes):
    def told(encode: dict[str, Delta], denoise: dict[str, Delta]) -> str:
        message = refusal(CheckpointError, peft.write, Adapter(encode, denoise), tmp_path / "new", "a/b")
        assert not (tmp_path / "new").exists()
        return message

    plain, dora = delta(shapes, Q), delta(shapes, Q, dora=True)
    assert told({}, {}) == "The adapter changes nothing, so there is nothing to write."
    assert told({Q: plain}, {Q: dora}) == (
        f"{Q} has a magnitude and model.encoder.language_model.layers.0.self_attn.q_proj has none; "
        "PEFT has DoRA for all linear maps of an adapter, never for experts."
    )
    assert told({Q: dora}, {GATE_UP: delta(shapes, GATE_UP, dora=True)}) == (
        f"{GATE_UP} has a magnitude and is of experts; "
        "PEFT has DoRA for all linear maps of an adapter, never for experts."
    )
    for path, mode in ((GATE, "encode"), (SIGHT, "denoise"), ("model.decoder.embed_tokens", "denoise")):
        deltas = {path: delta(shapes, path)}
        told_so = told(*((deltas, {}) if mode == "encode" else ({}, deltas)))
        assert told_so == f"PEFT's layout has no place for a change of {path} in the mode {mode}."
