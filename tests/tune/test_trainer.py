"""Training steps, their state, gradient processes and the memory estimate."""

from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import SGD
from mlx.utils import tree_flatten, tree_unflatten
from support import random_tokens, refusal, small_model
from training import QUICK, batch_of, trainer, weights

import mlx_dgemma
from mlx_dgemma.adapters import deltas
from mlx_dgemma.errors import DataError, MemoryLimitError, OptionError, PromptError
from mlx_dgemma.tune import objective as objective_module
from mlx_dgemma.tune import trainer as trainer_module
from mlx_dgemma.tune.config import TrainerConfig
from mlx_dgemma.tune.memory import training_need
from mlx_dgemma.tune.objective import VARIANTS, Batch, Noise
from mlx_dgemma.tune.trainer import Trainer, flatten
from mlx_dgemma.tune.workers import loss_and_gradients


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kind": "dora"},
        {"kind": "full", "rank": 16, "alpha": 32.0},
        {"dropout": 0.2, "recompute": False},
        {"accumulate": 2, "targets": ("experts", "router")},
        {"optimizer": "muon", "final": 0.0},
    ],
    ids=["lora", "dora", "full", "dropout", "accumulated", "muon"],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, changes):
    whole, first, second = (trainer(**changes) for _ in range(3))
    count = whole.config.accumulate
    drawn = [[batch_of(step * count + i) for i in range(count)] for step in range(4)]
    losses = [whole.update(batches).total for batches in drawn]
    for batches in drawn[:2]:
        first.update(batches)
    first.save(tmp_path, {"data": "a"})
    second.resume(tmp_path, {"data": "a"})
    assert second.step == 2
    assert [second.update(batches).total for batches in drawn[2:]] == losses[2:]
    mine, theirs = weights(second.model), weights(whole.model)
    assert mine.keys() == theirs.keys()
    assert all((mine[path] == theirs[path]).all() for path in mine)


@pytest.mark.parametrize(
    "kind, targets", [("lora", ("attention", "mlp")), ("lora", ("experts",)), ("full", ("attention",))]
)
def test_training_lowers_the_loss_and_only_changes_trainable_weights(kind, targets):
    own = {"rank": 16, "alpha": 32.0} if kind == "full" else {}
    one = trainer(kind=kind, targets=targets, steps=20, learning_rate=0.04, **own)
    before, batch = weights(one.model), batch_of(1, 4)
    start = np.mean([one.validation_loss(batch, i).total.item() for i in range(4)])
    for _ in range(20):
        one.update([batch])
    assert np.mean([one.validation_loss(batch, i).total.item() for i in range(4)]) < 0.8 * start
    after = weights(one.model)
    changed = {path for path in before if (before[path] != after[path]).any()}
    trained = {path for path, _ in tree_flatten(one.model.trainable_parameters())}
    assert changed == trained
    if kind == "full":
        assert not [path for path in trained if ".router." in path or "vision" in path]
        assert "model.decoder.embed_tokens.weight" in trained
    else:
        assert trained == {path for path in before if path.endswith(("lora_a", "lora_b"))}


def test_only_the_last_layers_are_trained():
    one = trainer(layers=1, targets=("attention", "self-conditioning"))
    paths = {path for path, _ in tree_flatten(one.model.trainable_parameters())}
    assert {path.split(".lora")[0] for path in paths} == {
        *(f"model.decoder.layers.2.self_attn.{name}_proj" for name in "qko"),  # a full layer takes V from K
        *deltas.SELF_CONDITIONING,
    }


def numbers_of(metrics):
    return [metrics.total, *metrics.parts.values(), metrics.norm, metrics.learning_rate]


def spied_noise(monkeypatch):
    """Every noise that a trainer draws from now on."""
    drawn, draw = [], objective_module.draw_noise
    monkeypatch.setattr(objective_module, "draw_noise", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    return drawn


def test_accumulated_gradients_are_those_of_the_whole_batch(monkeypatch):
    """A plain step of gradient descent shows their scale, which clipping and AdamW would hide."""
    one, drawn = trainer(accumulate=3, clip=0), spied_noise(monkeypatch)
    for _, module in one.model.named_modules():
        if "lora_b" in module:  # zero at first, and with it the gradients of the other factor
            module.lora_b = mx.array(np.random.default_rng(0).normal(size=module.lora_b.shape).astype(np.float32))
    one.optimizer = SGD(learning_rate=0.5)
    parts, before = [batch_of(i) for i in range(3)], flatten(one.model.trainable_parameters())
    before = {path: np.array(a) for path, a in before.items()}
    metrics = one.update(parts)
    whole = Batch(*(np.concatenate([getattr(p, n) for p in parts]) for n in ("tokens", "mask", "canvas", "supervised")))
    noise = Noise(*(mx.concatenate([mx.array(one) for one in column]) for column in zip(*drawn)))
    noise = noise._replace(conditioned=np.array(noise.conditioned))
    after = {path: np.array(a) for path, a in flatten(one.model.trainable_parameters()).items()}
    one.model.update(tree_unflatten([(path, mx.array(a)) for path, a in before.items()]))
    losses, gradients = loss_and_gradients(one.model, one.objective, whole, noise)
    gradients = {path: np.array(a) for path, a in flatten(gradients).items()}
    assert sum(np.abs(a).max() > 1e-3 for a in gradients.values()) == len(gradients)
    for path, gradient in gradients.items():
        np.testing.assert_allclose(before[path] - after[path], 0.5 * gradient, rtol=1e-3, atol=2e-6)
    assert metrics.total == pytest.approx(losses[0].item(), rel=1e-5)
    assert metrics.norm == pytest.approx(sum((a**2).sum() for a in gradients.values()) ** 0.5, rel=1e-4)


def test_every_micro_batch_has_noise_of_its_own(monkeypatch):
    one, drawn = trainer(accumulate=3), spied_noise(monkeypatch)
    batch = batch_of(0)
    for _ in range(3):
        one.update([batch] * 3)
    levels = [tuple(noise.t.tolist()) for noise in drawn]
    assert len(set(levels)) == 9 == len(levels)
    again, earlier = trainer(accumulate=3, seed=1), list(levels)
    again.update([batch] * 3)
    assert not {tuple(noise.t.tolist()) for noise in drawn[9:]} & set(earlier)


def test_the_learning_rate_rises_and_falls_to_its_final_share():
    one = trainer(steps=10, warmup=4, learning_rate=0.1)
    rates = [one.update([batch_of(0)]).learning_rate for _ in range(10)]
    assert rates[:4] == sorted(rates[:4]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) == pytest.approx(0.1)
    assert 0.01 < rates[-1] < 0.02
    one = trainer(steps=10, warmup=4, learning_rate=0.1, final=0.0)
    assert 0 < [one.update([batch_of(0)]).learning_rate for _ in range(10)][-1] < 0.01


def test_muon_updates_have_equal_singular_values_and_decoupled_weight_decay():
    one, two = trainer(optimizer="muon", weight_decay=0.0), trainer(optimizer="muon", weight_decay=10.0)
    before = weights(one.model)
    rate = one.update([batch_of(0)]).learning_rate
    two.update([batch_of(0)])
    mine, theirs = weights(one.model), weights(two.model)
    before = {path: was for path, was in before.items() if path.endswith(("lora_a", "lora_b"))}
    for path, was in before.items():
        change = mine[path] - was
        if np.abs(change).max() > 0:  # a change of `a` waits for the first one of `b`
            expected = rate * max(1, was.shape[0] / was.shape[1]) ** 0.5
            found = np.linalg.svd(change, compute_uv=False)
            assert found.max() / expected < 1.3 and found.min() / expected > 0.3
        np.testing.assert_allclose(theirs[path], mine[path] - 10 * rate * was, atol=1e-6)
    assert any(np.abs(mine[path] - was).max() > 0 for path, was in before.items())


def test_a_state_of_another_run_is_refused(tmp_path):
    one = trainer()
    one.update([batch_of(0)])
    assert refusal(DataError, one.resume, tmp_path, {}) == (
        f"{tmp_path} has no state.safetensors to resume from; start a new run without --resume."
    )
    one.save(tmp_path, {"data": "a"})
    file = tmp_path / "state.safetensors"
    assert refusal(DataError, one.resume, tmp_path, {"data": "b"}) == (
        f"{file} was trained with data 'a', and now it is 'b'; resume with the same value, or start a new run."
    )
    assert refusal(DataError, trainer(rank=3).resume, tmp_path, {"data": "a"}) == (
        f"{file} was trained with rank 2, and now it is 3; resume with the same value, or start a new run."
    )
    file.write_bytes(file.read_bytes()[:100])
    assert refusal(DataError, one.resume, tmp_path, {}) == f"{file} is broken; start a new run without --resume."


def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    one = trainer()
    one.save(tmp_path, {"data": "a"})
    before = (tmp_path / "state.safetensors").read_bytes()

    def full(path, *rest):
        Path(path).write_bytes(b"half")
        raise RuntimeError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(mx, "save_safetensors", full)
        with pytest.raises(Exception, match="No space left"):
            one.save(tmp_path, {"data": "a"})
    assert (tmp_path / "state.safetensors").read_bytes() == before
    one.resume(tmp_path, {"data": "a"})


def test_trainer_configs_are_checked():
    assert (
        refusal(OptionError, lambda: TrainerConfig(kind="qlora"))
        == "kind is 'qlora'; it should be one of lora, dora, full."
    )
    assert refusal(OptionError, TrainerConfig, rank=0) == "rank is 0; it should be at least 1."
    assert refusal(OptionError, TrainerConfig, dropout=1.0) == "dropout is 1.0; it should be at least 0 and below 1."
    assert refusal(OptionError, TrainerConfig, dropout=0.1) == (
        "dropout is 0.1, but recomputed layers would draw it again; add --keep."
    )
    for name, value in (("alpha", 0.0), ("learning_rate", float("nan")), ("learning_rate", float("inf"))):
        assert refusal(OptionError, TrainerConfig, **{name: value}) == f"{name} is {value}; it should be above 0."
    assert (
        refusal(OptionError, TrainerConfig, seed=2**31)
        == "seed is 2147483648; it should be at least 0 and below 2147483648."
    )
    assert refusal(OptionError, TrainerConfig, steps=3, warmup=3) == "warmup is 3; it should be below the 3 steps."
    assert refusal(OptionError, TrainerConfig, final=1.5) == "final is 1.5; it should be from 0 to 1."
    assert (
        refusal(OptionError, TrainerConfig, optimizer="sgd") == "optimizer is 'sgd'; it should be one of adamw, muon."
    )
    assert refusal(OptionError, lambda: TrainerConfig(optimizer="muon", kind="dora")) == (
        "optimizer is muon, which only trains matrices, but kind dora has other arrays; use adamw."
    )
    assert refusal(OptionError, TrainerConfig, optimizer="muon", targets=("mlp", "experts")) == (
        "optimizer is muon, which only trains matrices, but the target experts has other arrays; use adamw."
    )
    assert refusal(OptionError, TrainerConfig, targets=()) == "targets is empty; name at least one group."
    assert refusal(OptionError, lambda: TrainerConfig(kind="full", rank=4)) == (
        "rank is 4, but kind full has no rank; leave it out."
    )
    assert refusal(OptionError, lambda: TrainerConfig(kind="full", targets=("experts",))) == (
        "kind is full, which trains all modules; leave the target experts out."
    )
    one = trainer()
    assert refusal(OptionError, lambda: Trainer(one.model, one.config, one.objective)) == (
        "The model already has an adapter; load it without one."
    )
    half = small_model(0)
    half.set_dtype(mx.bfloat16)
    assert refusal(OptionError, lambda: Trainer(half, TrainerConfig(kind="full"), one.objective)) == (
        "kind is full, but small changes get lost in 16-bit weights; use --dtype float32."
    )


def test_targets_and_layers_are_checked():
    assert refusal(OptionError, trainer, targets=("heads",)) == (
        "There is no target 'heads'; choose from attention, mlp, experts, router, self-conditioning."
    )
    assert refusal(OptionError, trainer, layers=9) == "layers is 9; the model has 3."
    full = {"kind": "full", "rank": 16, "alpha": 32.0}
    assert refusal(OptionError, lambda: trainer(layers=9, **full)) == "layers is 9; the model has 3."


def test_a_loss_of_nan_is_refused_before_weights_change():
    one = trainer(learning_rate=0.02)
    one.update([batch_of(0)])
    before = weights(one.model)
    one.objective = replace(one.objective, encoder_weight=float("nan"))
    message = refusal(DataError, one.update, [batch_of(1)])
    assert (
        message == "The loss is nan and the norm of the gradients nan at step 2; lower --learning-rate, which is 0.02."
    )
    after = weights(one.model)
    assert all((before[path] == after[path]).all() for path in before)


@pytest.mark.parametrize(
    "rows, length, parts, recompute",
    [(1, 40, 1, True), (1, 40, 1, False), (2, 100, 1, True), (2, 100, 1, False), (5, 40, 2, False)],
)
def test_the_memory_estimate_bounds_the_peak(rows, length, parts, recompute):
    """The estimate is between the measured peak and six times the peak."""
    engine = mlx_dgemma.load(dtype="float32")
    tokens = np.array(random_tokens(0, rows, length, vocab=2000)) + 20
    canvas = np.array(random_tokens(1, rows, 64, vocab=2000))
    batch = Batch(tokens, np.ones(tokens.shape, bool), canvas, np.ones(canvas.shape, bool))
    method = TrainerConfig(rank=4, steps=10, recompute=recompute)
    one = Trainer(engine.model, method, VARIANTS["google"])
    one._cores = 2
    assert one.process_count(rows, length) == parts
    weight_bytes = sum(a.nbytes for a in flatten(engine.model.parameters()).values())
    mx.synchronize()
    mx.clear_cache()
    base = mx.get_active_memory() - weight_bytes
    mx.reset_peak_memory()
    for _ in range(2 if rows == 1 else 1):  # the state of the optimizer is there from the beginning
        one.update([batch])
    peak = one.peak_bytes - base
    one.close()
    needed = training_need(engine.checkpoint, method, rows, length + 64, one.trainable, weight_bytes, parts).total
    assert peak <= needed <= 6 * peak


@pytest.mark.parametrize("name", ["google", "nemo"])
def test_gradients_of_several_processes_sum_to_those_of_one(monkeypatch, name):
    whole, parted = (Trainer(small_model(0), TrainerConfig(**QUICK), VARIANTS[name]) for _ in range(2))
    monkeypatch.setattr(trainer_module, "MIN_POSITIONS", 1)
    whole._cores, parted._cores = 1, 2
    batch = batch_of(0, 3)
    batch.mask[0, :2] = batch.supervised[1, 2:] = False
    metrics = [[one.update([batch]) for _ in range(2)] for one in (whole, parted)]
    mine, theirs = (weights(one.model) for one in (whole, parted))
    assert numbers_of(metrics[0][1]) == pytest.approx(numbers_of(metrics[1][1]), rel=1e-5)
    assert all(np.allclose(mine[path], theirs[path], atol=1e-5) for path in mine)
    if name == "google":  # and the same ones again
        again = Trainer(small_model(0), TrainerConfig(**QUICK), VARIANTS[name])
        again._cores = 2
        assert [again.update([batch]) for _ in range(2)] == metrics[1]
        same = weights(again.model)
        assert all(np.array_equal(theirs[path], same[path]) for path in theirs)
        again.close()
    parted.close()


def test_an_error_in_another_process_is_raised_here(monkeypatch):
    one = trainer()
    monkeypatch.setattr(trainer_module, "MIN_POSITIONS", 1)
    one._cores = 2
    batch = replace(batch_of(0), features=[mx.zeros((1, 1)), None])
    assert "image placeholders" in refusal(PromptError, one.update, [batch])
    one._workers._processes[1].kill()
    assert refusal(MemoryLimitError, one.update, [batch_of(0)]) == (
        "A gradient process died, probably because memory ran out; lower --batch-size and continue with --resume."
    )
    one.update([batch_of(0)])  # others take their places
    one.close()
