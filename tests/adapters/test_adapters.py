"""Adapters in a model: both modes compute with the changed weights; loading, fusing, and all that is refused."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import INDEX, read_folder, write_safetensors
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
from support import gap, random_tokens, refusal, small_config, small_model

import mlx_dgemma
from mlx_dgemma.adapters import deltas as adapters
from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import Adapter, Delta, apply, start, taken, targets
from mlx_dgemma.adapters.fuse import fuse, write_checkpoint
from mlx_dgemma.checkpoint import build as build_module
from mlx_dgemma.checkpoint import memory
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.cli import main
from mlx_dgemma.convert import convert
from mlx_dgemma.convert.jobs import make_jobs, source_quantization
from mlx_dgemma.errors import CheckpointError, OptionError
from mlx_dgemma.model.device import on_cpu

BOUND = 1e-4
LINEAR = (nn.Linear, SwitchLinear)
DENSE = ("attention", "mlp", "self-conditioning")
ALL = (*DENSE, "experts", "router")
KINDS = {"lora": (ALL, False), "dora": (DENSE, True)}
LAYERS = "model.decoder.layers."
Q = "model.decoder.layers.0.self_attn.q_proj"
EXPERTS = "model.decoder.layers.0.experts.down_proj"
APART = "This adapter changes encoder and decoder differently, and they share their weights; use it with --adapter."
WIDE = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 16}  # groups of 32 fit
PROMPT = "Write JSON for: Anna is 31 years old and lives in Oslo."


@pytest.fixture(autouse=True)
def no_model_named(monkeypatch):
    monkeypatch.delenv("MLX_DGEMMA_MODEL", raising=False)


def small():
    return small_model(scale=0.2)


def deltas(model, groups=ALL, dora=False, seed=0, size=0.2, rank=2) -> dict[str, Delta]:
    """Random changes of all modules of some groups; entries of b @ a are about `size`."""
    random = np.random.default_rng(seed)

    def draw(*shape):
        return mx.array((random.normal(size=shape) * (size / rank**0.5) ** 0.5).astype(np.float32))

    found = {}
    for path in targets(model, groups):
        weight = adapters.plain_weight(adapters._module(model, path)).astype(mx.float32)
        *experts, out, width = weight.shape
        a, b = draw(*experts, rank, width), draw(*experts, out, rank)
        length = mx.linalg.norm(weight, axis=-1) * mx.array(random.uniform(0.5, 1.5, out).astype(np.float32))
        found[path] = Delta(a, b, 0.75, length if dora else None)
    return found


def modes_of(model, groups, dora, modes) -> Adapter:
    """Changes that are equal in both modes' layers, different, or in one mode alone."""
    first, second = (deltas(model, groups, dora, seed) for seed in (1, 2))
    encode = {path: delta for path, delta in first.items() if path.startswith(LAYERS)}
    if modes == "equal":
        return Adapter(encode, first)
    return Adapter({} if modes == "denoise" else encode, {} if modes == "encode" else second)


def changed(model, changes: dict[str, Delta]):
    """The model with the changes in its weights, by the formula."""
    for path, delta in changes.items():
        module = adapters._module(model, path)
        weight = np.array(module.weight) + delta.scale * np.array(delta.b) @ np.array(delta.a)
        if delta.magnitude is not None:
            weight = weight / np.sqrt((weight**2).sum(-1, keepdims=True)) * np.array(delta.magnitude)[:, None]
        module.weight = mx.array(weight)
    return model


def logits(encoder, decoder=None) -> list[mx.array]:
    """Of the prompt, and of two denoising steps, the second self-conditioned; 24 rows and more are sorted by expert."""
    decoder, prefix = decoder or encoder, encoder.new_prefix()
    vocab = encoder.config.text.vocab_size
    prompt = encoder.logits(encoder.encode(random_tokens(3, 1, 40, vocab=vocab), prefix))
    canvas = random_tokens(4, 1, encoder.config.canvas_length, vocab=vocab)
    one = decoder.logits(decoder.denoise(canvas, prefix))
    return [prompt, one, decoder.logits(decoder.denoise(canvas, prefix, decoder.condition(one / 0.8)))]


def gaps(a: list[mx.array], b: list[mx.array]) -> list[float]:
    return [gap(*pair) for pair in zip(a, b, strict=True)]


def equal(a: list[mx.array], b: list[mx.array]) -> bool:
    return all(mx.array_equal(*pair).item() for pair in zip(a, b, strict=True))


def shapes_of(model) -> dict[str, tuple[int, ...]]:
    return {name: one.shape for name, one in tree_flatten(model.parameters())}


# In a model.


@pytest.mark.parametrize("modes", ["equal", "different", "encode", "denoise"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_modes_compute_with_the_changed_weights(kind, modes):
    model, plain = small(), small()
    adapter = modes_of(model, *KINDS[kind], modes)
    apply(model, adapter)
    oracle = logits(changed(small(), adapter.encode), changed(small(), adapter.denoise))
    assert max(gaps(logits(model), oracle)) < BOUND
    far = [one > 0.1 for one in gaps(logits(model), logits(plain))]
    assert far == [modes != "denoise", True, True]
    assert adapter.shared == (model._encoder_layers is None) == (modes == "equal")


def test_modes_that_differ_share_every_weight():
    model = small()
    base = model.model.decoder.layers[0].self_attn.q_proj
    before = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    adapter = modes_of(model, ALL, False, "different")
    apply(model, adapter)
    layers = model._encoder_layers[0], model.model.decoder.layers[0]
    assert [layer.self_attn.q_proj.linear is base for layer in layers] == [True, True]
    assert layers[0].self_attn.q_norm is layers[1].self_attn.q_norm
    after = sum(one.nbytes for _, one in tree_flatten(model.parameters()))
    assert after - before == sum(delta.nbytes for delta in adapter.denoise.values())
    assert adapter.nbytes == sum(one.nbytes for mode in (adapter.encode, adapter.denoise) for one in mode.values())


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_started_changes_nothing_and_what_is_trained_goes_through_a_file(kind, tmp_path):
    groups, dora = KINDS[kind]
    model, key = small(), mx.random.key(7)
    before, shapes = logits(model), shapes_of(model)
    paths = targets(model, groups)
    start(model, paths, 2, 1.5, 0.0, dora, key)
    assert equal(logits(model), before)
    for path in paths:
        module = adapters._module(model, path)
        key, own = mx.random.split(key)
        module.lora_b = mx.random.normal(module.lora_b.shape, scale=0.3, key=own)
        if dora:
            module.m = module.m * 1.25
    adapter = taken(model)
    assert adapter.shared
    assert list(adapter.changes) == [path for path in adapter.denoise if path in paths]
    assert len(adapter.denoise) == len(paths)
    peft.write(adapter, tmp_path / "a", "base")
    again = peft.read(tmp_path / "a", shapes)
    for mode in ("encode", "denoise"):
        ours, theirs = getattr(adapter, mode), getattr(again, mode)
        assert ours.keys() == theirs.keys()
        assert all(delta.same(theirs[path]) for path, delta in ours.items())
    other = small()
    apply(other, again)
    assert equal(logits(other), logits(model))
    assert min(gaps(logits(model), before)) > 0.1


def test_targets_are_the_last_layers_modules():
    model = small()
    assert targets(model, ("attention",), 2) == [
        *(f"{LAYERS}1.self_attn.{name}_proj" for name in "qko"),  # a full layer takes V from K
        *(f"{LAYERS}2.self_attn.{name}_proj" for name in "qkvo"),
    ]
    assert targets(model, ("router", "self-conditioning"), 1) == [
        f"{LAYERS}2.router.proj",
        *(f"model.decoder.self_conditioning.{name}_proj" for name in ("gate", "up", "down")),
    ]


def packed(mode, bits=4):
    """A model with packed linear maps, or without where the mode is None, and its unpacked twin."""
    found = []
    for unpack in (False, True):
        model = small_model(scale=0.2, **WIDE)
        if mode:
            nn.quantize(model, 32, bits, mode=mode, class_predicate=lambda _, m: isinstance(m, LINEAR))
        if unpack:
            build_module._dequantize(model, mx.float32)
        found.append(model)
    return found


def stored(model, folder):
    """A packed model, or one of the same sizes, as a checkpoint."""
    config = small_config(**WIDE)
    for mode in {module.mode for module in model.modules() if "scales" in module}:
        config["quantization"] = {"group_size": 32, "bits": 4, "mode": mode}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return folder


def written(adapter, folder):
    peft.write(adapter, folder, "base")
    return folder


@pytest.mark.parametrize(("mode", "kind"), [("affine", "lora"), ("affine", "dora"), ("mxfp4", "lora")])
def test_packed_weights_take_an_adapter_as_unpacked_ones_do(mode, kind):
    model, twin = packed(mode)
    adapter = modes_of(twin, *KINDS[kind], "equal")
    before = logits(model)
    apply(model, adapter)
    apply(twin, adapter)
    together = logits(model)
    assert max(gaps(together, logits(twin))) < 1e-3
    assert min(gaps(together, before)) > 0.1


@pytest.mark.parametrize(("mode", "kind"), [(m, k) for m in (None, "affine", "mxfp4") for k in KINDS])
def test_what_is_fused_unpacked_computes_the_same(mode, kind, tmp_path):
    model, twin = packed(mode)
    adapter = modes_of(twin, *KINDS[kind], "equal")
    report = fuse(written(adapter, tmp_path / "a"), tmp_path / "out", stored(model, tmp_path / "in"), dequantize=True)
    fused = Checkpoint.open(tmp_path / "out")
    before = logits(twin)
    apply(twin, adapter)
    assert max(gaps(logits(build(fused)), logits(twin))) < 1e-3
    assert min(gaps(logits(twin), before)) > 0.1
    assert sorted(report.modules) == sorted(adapter.changes)
    assert not {f"{path}.scales" for path in report.modules} & set(fused.tensors)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_fused_weights_are_packed_as_they_were(mode, tmp_path):
    model, twin = packed(mode)
    adapter = modes_of(twin, ALL, False, "equal")
    report = fuse(written(adapter, tmp_path / "a"), tmp_path / "out", stored(model, tmp_path / "in"))
    assert report.packed == report.modules
    fused = build(Checkpoint.open(tmp_path / "out"))
    for path, module in model.named_modules():
        if "scales" not in module:
            continue
        expected = [module.weight, module.scales, module.get("biases")]
        if path in adapter.changes:
            weight = adapter.changes[path].on(adapters.plain_weight(module))
            expected = [*mx.quantize(weight, 32, 4, mode), None][:3]
        found = adapters._module(fused, path)
        pairs = zip(expected, (found.weight, found.scales, found.get("biases")), strict=True)
        assert all(a is b or mx.array_equal(a, b).item() for a, b in pairs), path


# What is refused.


@pytest.mark.parametrize("path", ["model.decoder.layers.3.self_attn.q_proj", "model.decoder.layers.1.self_attn.v_proj"])
def test_a_module_that_is_not_there(path):
    one = Delta(mx.zeros((1, 16)), mx.zeros((32, 1)), 1.0)
    for adapter in (Adapter({path: one}, {}), Adapter({}, {path: one})):
        assert refusal(CheckpointError, apply, small(), adapter) == (
            f"The adapter changes {path}, which this model does not have; it is another one's."
        )


@pytest.mark.parametrize(
    "path",
    ["model.decoder.layers.0.input_layernorm", "model.decoder.layers.0.layer_scalar", "model.decoder.embed_tokens"],
)
def test_a_module_that_takes_no_change(path):
    adapter = Adapter({}, {path: Delta(mx.zeros((1, 16)), mx.zeros((40, 1)), 1.0)})
    assert refusal(CheckpointError, apply, small(), adapter) == (
        f"The adapter changes {path}, which takes no such change."
    )


def test_targets_that_there_are_not():
    model = small()
    assert refusal(OptionError, targets, model, ("mlp", "heads")) == (
        "There is no target 'heads'; take some of attention, mlp, experts, router, self-conditioning."
    )
    for count in (0, 4, -1):
        assert refusal(OptionError, targets, model, ("mlp",), count) == f"layers is {count}; the model has 3."


def test_dora_that_cannot_be_computed():
    model, _ = packed("mxfp4")
    told = f"The adapter is a DoRA, which {Q} in mxfp4 cannot take; use affine weights."
    assert refusal(CheckpointError, apply, model, Adapter({}, {Q: deltas(model, DENSE, True)[Q]})) == told
    assert refusal(CheckpointError, start, model, [Q], 2, 1.0, 0.0, True, mx.random.key(0)) == told
    one = deltas(model)[EXPERTS]
    adapter = Adapter({}, {EXPERTS: replace(one, magnitude=mx.ones(64))})
    assert refusal(CheckpointError, apply, model, adapter) == (
        f"The adapter changes {EXPERTS}, which takes no such change."
    )
    assert refusal(OptionError, start, model, [EXPERTS], 2, 1.0, 0.0, True, mx.random.key(0)) == (
        "DoRA is not defined for experts here; leave experts out of --targets, or take lora."
    )


@pytest.mark.parametrize("modes", ["different", "encode", "denoise"])
def test_modes_that_differ_cannot_be_fused(modes, tmp_path):
    model, _ = packed(None)
    folder = written(modes_of(model, DENSE, False, modes), tmp_path / "a")
    source = stored(model, tmp_path / "in")
    assert refusal(CheckpointError, fuse, folder, tmp_path / "new" / "out", source) == APART
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a", "in"]


# Loaded with a checkpoint, and fused into one.


@pytest.fixture(scope="module")
def float32(demo, tmp_path_factory):
    """The demo in float32."""
    folder = tmp_path_factory.mktemp("demo") / "float32"
    convert(demo, folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def adapter(demo, tmp_path_factory):
    """A LoRA of everything but the vision tower, the same in both modes and strong enough to be seen."""
    model = build(Checkpoint.open(demo), "float32")
    changes = deltas(model, ALL, seed=5, size=0.04)
    shared = {path: delta for path, delta in changes.items() if path.startswith(LAYERS)}
    folder = tmp_path_factory.mktemp("adapter")
    peft.write(Adapter(shared, changes), folder, "demo")
    return folder


@pytest.fixture(scope="module")
def apart(demo, tmp_path_factory):
    """A DoRA of denoising alone."""
    model = build(Checkpoint.open(demo), "float32")
    folder = tmp_path_factory.mktemp("apart")
    peft.write(Adapter({}, deltas(model, DENSE, True, 6, 0.02)), folder, "demo")
    return folder


def of(path, **options):
    return logits(mlx_dgemma.load(path, dtype="float32", **options).model)


def test_an_adapter_is_loaded_with_a_checkpoint(demo, adapter, apart):
    plain = mlx_dgemma.load(demo)
    assert plain.adapter is None
    engine, other = mlx_dgemma.load(demo, adapter=adapter), mlx_dgemma.load(demo, adapter=str(apart))
    assert (engine.adapter, other.adapter) == (adapter, apart)
    changes = peft.read(adapter, plain.checkpoint.shapes)
    assert engine.notes[-1] == f"The adapter {adapter} changes {len(changes.changes)} modules, both modes alike."
    assert other.notes[-1].endswith(" modules, encoder and decoder differently.")
    assert max(gaps(logits(engine.model), logits(changed(plain.model, changes.changes)))) < 1e-3
    if on_cpu():  # the base keeps its layout
        for path, kind in ((Q, 2), (EXPERTS, 3)):
            base = adapters._module(engine.model, path).linear.weight
            strides = np.asarray(base).strides
            assert (base.dtype, base.ndim, strides[-2]) == (mx.float32, kind, 4)


def test_an_adapter_counts_as_memory(demo, adapter, monkeypatch):
    needed = []
    monkeypatch.setattr(memory, "check", lambda _, need: needed.append(need.weights))
    engine = mlx_dgemma.load(demo, adapter=adapter)
    mlx_dgemma.load(demo)
    assert needed[0] - needed[1] == peft.read(adapter, engine.checkpoint.shapes).nbytes > 10**5


def test_an_adapter_is_found_here_first_and_then_on_the_hub(adapter, demo, tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

    asked, answers = [], {True: LocalEntryNotFoundError("not here"), False: str(adapter)}

    def snapshot(repo, allow_patterns, local_files_only=False):
        asked.append(local_files_only)
        assert (repo, allow_patterns) == ("some/adapter", ["adapter_config.json", "adapter_model.safetensors"])
        if isinstance(answers[local_files_only], Exception):
            raise answers[local_files_only]
        return answers[local_files_only]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert mlx_dgemma.load(demo, adapter="some/adapter").adapter == adapter
    assert asked == [True, False]
    answers[True] = str(tmp_path)  # an interrupted download
    assert peft.find("some/adapter") == adapter
    answers[True] = str(adapter)
    assert peft.find("some/adapter") == adapter
    assert asked == [True, False] * 2 + [True]
    answers.update(
        {True: LocalEntryNotFoundError("no"), False: RepositoryNotFoundError.__new__(RepositoryNotFoundError)}
    )
    assert refusal(CheckpointError, peft.find, "some/adapter") == (
        "some/adapter is neither a folder here nor a repository on the Hub; check the name, or log in if it is private."
    )
    for name in ("./none", "none", "/nowhere/at/all", "a/b/c"):
        assert refusal(CheckpointError, mlx_dgemma.load, demo, adapter=name) == (
            f"{name} does not exist; give an adapter's folder or its Hub id."
        )
    assert refusal(CheckpointError, mlx_dgemma.load, demo, adapter=demo) == (
        f"{demo} has no adapter_config.json; point at a folder that holds a PEFT adapter."
    )


def test_a_fused_checkpoint_computes_the_same(float32, adapter, tmp_path):
    report = fuse(adapter, tmp_path / "out", float32)
    together = of(float32, adapter=adapter)
    assert max(gaps(of(tmp_path / "out"), together)) < BOUND
    assert min(gaps(together, of(float32))) > 1
    before, after = read_folder(float32), read_folder(tmp_path / "out")
    differing = {name for name in before if before[name] != after[name]}
    assert list(before) == list(after)
    assert differing == {f"{path}.weight" for path in report.modules}
    assert all(before[name][:2] == after[name][:2] for name in before)
    assert report.packed == ()
    assert report.nbytes == sum(len(data) for *_, data in after.values())
    for file in ("config.json", "tokenizer.json", "chat_template.jinja", INDEX):
        assert (tmp_path / "out" / file).read_bytes() == (float32 / file).read_bytes()
    assert make_jobs(Checkpoint.open(tmp_path / "out"), {}, None, None)


@pytest.mark.parametrize("layout", ["release", "halves"])
def test_any_layout_is_fused_to_the_same_bytes(hf_checkpoint, demo, adapter, tmp_path, layout):
    """And unchanged tensors keep theirs, in the dtype that is stored."""
    source = hf_checkpoint
    if layout == "halves":
        source = tmp_path / "halves"
        source.mkdir()
        for file in demo.iterdir():
            if file.suffix != ".safetensors" and file.name != INDEX:
                (source / file.name).write_bytes(file.read_bytes())
        tensors = {}
        for name, (dtype, shape, data) in read_folder(demo).items():
            if not name.endswith("gate_up_proj.weight"):
                tensors[name] = (dtype, shape, data)
                continue
            rows = np.frombuffer(data, np.uint16).reshape(shape)
            half = [shape[0], shape[1] // 2, shape[2]]
            for part, cut in zip(("gate", "up"), (rows[:, : half[1]], rows[:, half[1] :])):
                tensors[name.replace("gate_up", part)] = (dtype, half, cut.tobytes())
        write_safetensors(source / "model.safetensors", tensors)
    fuse(adapter, tmp_path / "ours", demo)
    report = fuse(adapter, tmp_path / "theirs", source)
    ours, plain = read_folder(tmp_path / "ours"), read_folder(demo)
    assert ours == read_folder(tmp_path / "theirs")
    assert {name for name in ours if ours[name] != plain[name]} == {f"{path}.weight" for path in report.modules}
    assert {dtype for dtype, *_ in ours.values()} == {"BF16"}


def test_a_packed_checkpoint_is_fused_packed_or_not(demo, adapter, tmp_path):
    convert(demo, tmp_path / "packed", "4bit")
    source = Checkpoint.open(tmp_path / "packed")
    report = fuse(adapter, tmp_path / "again", source.path)
    plain = fuse(adapter, tmp_path / "plain", source.path, dequantize=True)
    assert report.packed == report.modules
    assert plain.packed == ()
    before, after = read_folder(source.path), read_folder(tmp_path / "again")
    assert {name: one[:2] for name, one in before.items()} == {name: one[:2] for name, one in after.items()}
    again, kept = Checkpoint.open(tmp_path / "again"), Checkpoint.open(tmp_path / "plain")
    assert again.raw_config == source.raw_config
    packing = source_quantization(source)
    assert source_quantization(again) == packing
    assert source_quantization(kept) == {path: q for path, q in packing.items() if path not in report.modules}
    assert [path for path in kept.quantization if path in report.modules] == []
    assert {one.dtype for name, one in kept.tensors.items() if name.endswith("_proj.weight")} == {"BF16"}
    together, base = of(source.path, adapter=adapter), of(source.path)
    rounded, unpacked = (gaps(together, of(tmp_path / name)) for name in ("again", "plain"))
    effect = gaps(together, base)
    assert max(unpacked) < min(rounded)
    assert max(unpacked) < 0.5 * min(effect)


def test_a_dora_is_fused_too_whatever_packs_the_weights(demo, tmp_path):
    model = build(Checkpoint.open(demo), "float32")
    changes = deltas(model, DENSE, True, 6, 0.02)
    peft.write(Adapter({p: d for p, d in changes.items() if p.startswith(LAYERS)}, changes), tmp_path / "dora", "demo")
    convert(demo, tmp_path / "packed", "mxfp4")
    fuse(tmp_path / "dora", tmp_path / "plain", tmp_path / "packed", dequantize=True)
    expected = changed(build(Checkpoint.open(tmp_path / "packed"), "float32", True), changes)
    found = build(Checkpoint.open(tmp_path / "plain"), "float32", True)
    for path in changes:
        weight = adapters._module(expected, path).weight
        assert gap(adapters._module(found, path).weight, weight) < 2**-8 * mx.abs(weight).max().item()


def test_what_cannot_be_fused_leaves_nothing(demo, adapter, apart, tmp_path):
    assert refusal(CheckpointError, fuse, apart, tmp_path / "new" / "out", demo) == APART
    (tmp_path / "out").mkdir()
    assert refusal(OptionError, fuse, adapter, tmp_path / "out", demo) == (
        f"{tmp_path / 'out'} exists; delete it or choose another OUT."
    )
    assert [one.name for one in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("recipe", [None, "4bit"])
def test_a_model_is_written_as_its_checkpoint_stores_it(demo, tmp_path, recipe):
    """Whatever layout and dtype it computes with; what is there already is replaced."""
    source = demo
    if recipe:
        source = tmp_path / "packed"
        convert(demo, source, recipe)
    checkpoint = Checkpoint.open(source)
    model = build(checkpoint, "float32", bool(recipe))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_bytes(b"")
    write_checkpoint(model, checkpoint, tmp_path / "out")
    found = read_folder(tmp_path / "out")
    if recipe is None:
        assert found == read_folder(demo)
        assert (tmp_path / "out" / "config.json").read_bytes() == (demo / "config.json").read_bytes()
    else:
        assert {name: one[:2] for name, one in found.items()} == {n: one[:2] for n, one in read_folder(demo).items()}
        assert max(gaps(of(tmp_path / "out"), logits(model))) < 1
    model.model.decoder.layers[0].self_attn.q_proj.weight *= 0
    write_checkpoint(model, checkpoint, tmp_path / "out")
    again = read_folder(tmp_path / "out")
    assert [name for name in found if found[name] != again[name]] == [f"{Q}.weight"]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out", "packed"][: 1 + bool(recipe)]


# The commands.


def run(*arguments, data=None):
    return CliRunner().invoke(main.main, [str(one) for one in arguments], input=data, prog_name="mlx-dgemma")


def test_an_adapter_changes_an_answer_and_the_fused_checkpoint_gives_the_same(float32, adapter, tmp_path):
    ask = ("generate", PROMPT, "--seed", 1, "--max-denoising-steps", 4)
    plain, other = run(*ask, "-m", float32), run(*ask, "-m", float32, "--adapter", adapter)
    assert plain.stdout == '{"name": "Anna", "age": 31, "city": "Oslo"}\n'
    assert other.exit_code == 0
    assert other.stdout != plain.stdout
    done = run("fuse", "--adapter", adapter, "--model", float32, tmp_path / "out")
    first, second = done.stdout.splitlines()
    assert (done.exit_code, done.stderr) == (0, "")
    assert first == f"{float32} with {adapter} -> {tmp_path / 'out'}"
    assert second.startswith("62 changed weights, ")
    assert run(*ask, "-m", tmp_path / "out").stdout == other.stdout


def test_packing_again_is_told(demo, adapter, tmp_path):
    convert(demo, tmp_path / "packed", "8bit")
    done = run("fuse", "--adapter", adapter, "--model", tmp_path / "packed", tmp_path / "out")
    assert done.stderr == "Packed again, which rounds: 62 changed weights; --dequantize leaves them unpacked.\n"
    done = run("fuse", "--adapter", adapter, "--model", tmp_path / "packed", tmp_path / "plain", "--dequantize")
    assert (done.exit_code, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "x"),
        ("chat",),
        ("infill", "-"),
        ("edit", "x", "-"),
        ("choose", "x", "a", "b"),
        ("serve", "--port", 0),
    ],
)
def test_every_command_that_answers_takes_an_adapter(command):
    done = run(*command, "--adapter", "./none", data="a <HOLE> b")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[-1] == ("Error: ./none does not exist; give an adapter's folder or its Hub id.")


def test_evaluate_and_fuse_take_an_adapter(tmp_path):
    data = tmp_path / "test.jsonl"
    data.write_text(json.dumps({"prompt": "Say a.", "completion": "a"}) + "\n")
    for command in (("evaluate", data), ("fuse", tmp_path / "out")):
        done = run(*command, "--adapter", "./none")
        assert done.stderr.splitlines()[-1] == "Error: ./none does not exist; give an adapter's folder or its Hub id."


def test_a_server_says_what_adapter_it_has(adapter, monkeypatch):
    import uvicorn

    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: None)
    done = run("serve", "--port", 0, "--adapter", adapter)
    told = done.stderr.splitlines()[-1]
    assert told.startswith("Listening on http://127.0.0.1:")
    assert told.endswith(f"/v1 with the adapter {adapter}; Ctrl-C stops it.")
