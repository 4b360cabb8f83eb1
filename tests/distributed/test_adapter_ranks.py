"""A LoRA on several ranks: dealt with the layers that it changes, it changes answers as on one."""

import mlx.core as mx
import pytest
from answers import few_answers
from ranks import on_threads
from support import engine_of

import mlx_dgemma
from mlx_dgemma.adapters import peft
from mlx_dgemma.adapters.deltas import GROUPS, LAYERS, Adapter, Delta, target_paths
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.decoding.costs import random_prefix
from mlx_dgemma.errors import CircumstanceError


def save(folder, seed, modes=(1, 1), dora=False):
    """An adapter of all linear layers, the experts too, unless it is a DoRA; its modes are factors of the change."""
    model, random = engine_of(DEMO).model, iter(mx.random.split(mx.random.key(seed), 1000))
    groups = [name for name in (*GROUPS, "self-conditioning") if not (dora and name == "experts")]
    found = [{}, {}]
    for path in target_paths(model, groups):
        module = model
        for name in path.split("."):
            module = module[int(name)] if isinstance(module, list) else module[name]
        *experts, out, width = module.weight.shape
        shapes = (*experts, 2, width), (*experts, out, 2)
        a, b = (0.17 * mx.random.normal(shape, key=next(random)) for shape in shapes)
        for factor, deltas in zip(modes, found):
            deltas[path] = Delta(a, factor * b, 0.75, mx.ones(out) if dora else None)
    shared = {path: delta for path, delta in found[0].items() if path.startswith(LAYERS)}
    peft.write(Adapter(shared, found[1]), folder, "base")
    return folder


def test_a_lora_is_dealt_with_its_layers(tmp_path):
    """Of four ranks one repeats a KV head; the modes differ, so that the encoder has layers of its own."""
    adapter = save(tmp_path / "a", 1, (1, -0.5))

    def work(group):
        engine = mlx_dgemma.load(DEMO, dtype="float32", adapter=adapter, group=group)
        held = sum(delta.size for delta in adapted(engine.model))
        mx.eval(random_prefix(engine.model, 4).state)
        return few_answers(engine), held

    alone = mlx_dgemma.load(DEMO, dtype="float32", adapter=adapter)
    expected, whole = few_answers(alone), sum(delta.size for delta in adapted(alone.model))
    assert expected != few_answers(engine_of(DEMO))
    found = on_threads(4, work)
    assert [answers for answers, _ in found] == [expected] * 4
    assert max(held for _, held in found) < 0.8 * whole


def adapted(model):
    """The arrays of all deltas."""
    for layer in [*model.model.decoder.layers, *(model._encoder_layers or ())]:
        for module in layer.modules():
            if "lora_a" in module:
                yield from (module.lora_a, module.lora_b)


def test_adapters_that_no_rank_can_use_or_that_differ_are_refused(tmp_path):
    first, second, dora = save(tmp_path / "a", 1), save(tmp_path / "b", 2), save(tmp_path / "c", 1, dora=True)

    def work(group):
        with pytest.raises(CircumstanceError, match=r"is a DoRA, whose magnitudes need whole rows .*: mlx-dgemma fuse"):
            mlx_dgemma.load(DEMO, adapter=dora, group=group)
        with pytest.raises(CircumstanceError, match=r"^Rank 1 has the adapter '.*', and rank 0 has '.*'; give both"):
            mlx_dgemma.load(DEMO, adapter=second if group.rank else first, group=group)

    on_threads(2, work)
