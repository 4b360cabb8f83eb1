"""Training steps, saves, resumption and a whole run, on models of milliseconds and on the demo."""

import json
from dataclasses import astuple, replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.optimizers import clip_grad_norm
from mlx.utils import tree_flatten, tree_map
from support import RED, random_tokens, refusal, small_model, square

import mlx_dgemma
from mlx_dgemma.adapters import deltas
from mlx_dgemma.cli import tune as cli_tune
from mlx_dgemma.cli.main import main
from mlx_dgemma.errors import DataError, MemoryLimitError, OptionError, PromptError
from mlx_dgemma.model.layers import Layer
from mlx_dgemma.tune import trainer as trainer_module
from mlx_dgemma.tune.batches import Batches, canvases, order
from mlx_dgemma.tune.curves import COLUMNS, Log, draw
from mlx_dgemma.tune.data import Example, Target, read
from mlx_dgemma.tune.objective import VARIANTS, Batch, Noise, loss
from mlx_dgemma.tune.objective import draw as noise_of
from mlx_dgemma.tune.run import Plan, need
from mlx_dgemma.tune.run import tune as run_
from mlx_dgemma.tune.trainer import Method, Trainer, flat

QUICK = {"rank": 2, "alpha": 4.0, "learning_rate": 0.01, "steps": 6, "warmup": 1}


def batch_of(number, rows=2):
    tokens, canvas = np.array(random_tokens(number, rows, 7)), np.array(random_tokens(number + 100, rows, 4))
    return Batch(tokens, np.ones(tokens.shape, bool), canvas, np.ones(canvas.shape, bool))


def trainer(**changes):
    return Trainer(small_model(0), Method(**{**QUICK, **changes}), VARIANTS["google"])


def weights(model):
    return {path: np.array(a) for path, a in tree_flatten(model.parameters())}


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
def test_stopped_and_resumed_is_bit_for_bit_one_run(tmp_path, changes):
    whole, first, second = (trainer(**changes) for _ in range(3))
    count = whole.method.accumulate
    drawn = [[batch_of(step * count + i) for i in range(count)] for step in range(6)]
    losses = [whole.update(batches).total for batches in drawn]
    for batches in drawn[:3]:
        first.update(batches)
    first.save(tmp_path, {"data": "a"})
    second.resume(tmp_path, {"data": "a"})
    assert second.step == 3
    assert [second.update(batches).total for batches in drawn[3:]] == losses[3:]
    mine, theirs = weights(second.model), weights(whole.model)
    assert mine.keys() == theirs.keys()
    assert all((mine[path] == theirs[path]).all() for path in mine)


@pytest.mark.parametrize(
    "kind, targets", [("lora", ("attention", "mlp")), ("lora", ("experts",)), ("full", ("attention",))]
)
def test_training_lowers_the_loss_and_changes_what_it_should(kind, targets):
    own = {"rank": 16, "alpha": 32.0} if kind == "full" else {}
    one = trainer(kind=kind, targets=targets, steps=40, learning_rate=0.02, **own)
    before, batch = weights(one.model), batch_of(1, 4)
    start = np.mean([one.measure(batch, i).total.item() for i in range(8)])
    for _ in range(40):
        one.update([batch])
    assert np.mean([one.measure(batch, i).total.item() for i in range(8)]) < 0.8 * start
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
        *(f"model.decoder.layers.2.self_attn.{name}_proj" for name in "qkvo"),
        *deltas.SELF_CONDITIONING,
    }


def test_accumulated_gradients_are_the_mean():
    one, two = trainer(), trainer(accumulate=2)
    parts = [batch_of(0, 1), batch_of(1, 1)]
    (_, first), (_, second) = (two._gradients(parts[i], i) for i in (0, 1))
    mean, _ = clip_grad_norm(tree_map(lambda a, b: (a + b) / 2, first, second), 1.0)
    one.optimizer.update(one.model, mean)
    two.update(parts)
    mine, theirs = weights(one.model), weights(two.model)
    assert all(np.allclose(mine[path], theirs[path], atol=1e-6) for path in mine)


def test_the_learning_rate_rises_and_falls_to_its_final_share():
    one = trainer(steps=10, warmup=4, learning_rate=0.1)
    rates = [one.update([batch_of(0)]).learning_rate for _ in range(10)]
    assert rates[:4] == sorted(rates[:4]) and rates[4:] == sorted(rates[4:], reverse=True)
    assert max(rates) == pytest.approx(0.1)
    assert 0.01 < rates[-1] < 0.02
    one = trainer(steps=10, warmup=4, learning_rate=0.1, final=0.0)
    assert 0 < [one.update([batch_of(0)]).learning_rate for _ in range(10)][-1] < 0.01


def test_muon_changes_matrices_along_all_directions_and_decays_them_as_adamw_does():
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
        f"{tmp_path} holds no state.safetensors to resume from; start anew without --resume."
    )
    one.save(tmp_path, {"data": "a"})
    file = tmp_path / "state.safetensors"
    assert refusal(DataError, one.resume, tmp_path, {"data": "b"}) == (
        f"{file} was trained with data 'a', and now it is 'b'; resume with the same, or start anew."
    )
    assert refusal(DataError, trainer(rank=3).resume, tmp_path, {"data": "a"}) == (
        f"{file} was trained with rank 2, and now it is 3; resume with the same, or start anew."
    )
    file.write_bytes(file.read_bytes()[:100])
    assert refusal(DataError, one.resume, tmp_path, {}) == f"{file} is broken; start anew without --resume."


def test_methods_are_checked():
    assert (
        refusal(OptionError, lambda: Method(kind="qlora")) == "kind is 'qlora'; it should be one of lora, dora, full."
    )
    assert refusal(OptionError, Method, rank=0) == "rank is 0; it should be at least 1."
    assert refusal(OptionError, Method, dropout=1.0) == "dropout is 1.0; it should be at least 0 and below 1."
    assert refusal(OptionError, Method, dropout=0.1) == (
        "dropout is 0.1, and layers computed again would draw another one; give --keep too."
    )
    for name, value in (("alpha", 0.0), ("learning_rate", float("nan")), ("learning_rate", float("inf"))):
        assert refusal(OptionError, Method, **{name: value}) == f"{name} is {value}; it should be above 0."
    assert (
        refusal(OptionError, Method, seed=2**31) == "seed is 2147483648; it should be at least 0 and below 2147483648."
    )
    assert refusal(OptionError, Method, steps=3, warmup=3) == "warmup is 3; it should be below the 3 steps."
    assert refusal(OptionError, Method, final=1.5) == "final is 1.5; it should be from 0 to 1."
    assert refusal(OptionError, Method, optimizer="sgd") == "optimizer is 'sgd'; it should be one of adamw, muon."
    assert refusal(OptionError, lambda: Method(optimizer="muon", kind="dora")) == (
        "optimizer is muon, which takes matrices alone, and kind dora has others; take adamw."
    )
    assert refusal(OptionError, Method, optimizer="muon", targets=("mlp", "experts")) == (
        "optimizer is muon, which takes matrices alone, and the target experts has others; take adamw."
    )
    assert refusal(OptionError, Method, targets=()) == "targets is empty; name at least one group."
    assert refusal(OptionError, lambda: Method(kind="full", rank=4)) == (
        "rank is 4, but kind is full, which knows none; leave it out."
    )
    assert refusal(OptionError, lambda: Method(kind="full", targets=("experts",))) == (
        "kind is full, which trains every part; leave the target experts out."
    )
    one = trainer()
    assert refusal(OptionError, lambda: Trainer(one.model, one.method, one.objective)) == (
        "The model has an adapter already; load it without one."
    )
    half = small_model(0)
    half.set_dtype(mx.bfloat16)
    assert refusal(OptionError, lambda: Trainer(half, Method(kind="full"), one.objective)) == (
        "kind is full, and 16-bit weights would lose small changes; give --dtype float32."
    )


def test_plans_are_checked():
    for name, value in (("batch_size", 0), ("save_every", 0), ("validate", 0)):
        assert refusal(OptionError, lambda n=name, v=value: Plan("a", Path("b"), **{n: v})) == (
            f"{name} is {value}; it should be at least 1."
        )
    assert refusal(OptionError, lambda: Plan("a", Path(""))) == "output is empty; name a folder to make."
    assert refusal(OptionError, lambda: Plan("a", Path("b"), self_conditioning=2.0)) == (
        "self_conditioning is 2.0; it should be from 0 to 1."
    )
    assert refusal(OptionError, lambda: Plan("a", Path("b"), noise_min=1.0)) == (
        "noise_min is 1.0; it should be above 0 and below 0.9999."
    )
    chosen = Plan("a", Path("b"), "megatron", noise_min=0.2).objective
    t = np.array(noise_of(batch_of(0, rows=64), chosen, 40, mx.random.key(0)).t)
    assert 0.2 <= t.min() < 0.3 and 0.9 < t.max() <= 1


def test_more_methods_are_checked():
    assert refusal(OptionError, trainer, targets=("heads",)) == (
        "There is no target 'heads'; take some of attention, mlp, experts, router, self-conditioning."
    )
    assert refusal(OptionError, trainer, layers=9) == "layers is 9; the model has 3."
    full = {"kind": "full", "rank": 16, "alpha": 32.0}
    assert refusal(OptionError, lambda: trainer(layers=9, **full)) == "layers is 9; the model has 3."


def test_an_answer_is_cut_into_canvases():
    target = Target([1, 2], [3, 4, 5, 6, 7], [])
    assert [(one.prefix, one.tokens, one.own) for one in canvases(target, 4, 9)] == [
        ([1, 2], [3, 4, 5, 6], 4),
        ([1, 2, 3, 4, 5, 6], [7, 9, 9, 9], 1),
    ]


class Sizes:
    """What batches need to know of an engine."""

    class config:
        canvas_length = 4


def test_batches_are_padded_on_the_left_and_drawn_by_number():
    examples = [Example(f"line {i}", [Target(list(range(1, 2 + i)), [20 + i] * (3 + 2 * i), [])], {}) for i in range(4)]
    batches = Batches(Sizes(), examples, 9, False, 3)
    batch = batches.batch([0, 3], [5, 6])
    longest = batch.tokens.shape[1]
    assert batch.tokens[0].tolist() == [0] * (longest - 1) + [1]
    assert batch.real[0].tolist() == [False] * (longest - 1) + [True]
    assert batch.real[1].all()
    assert batch.canvas[0].tolist() == [20, 20, 20, 9]
    assert batch.supervised[0].tolist() == [True, True, True, False]
    assert Batches(Sizes(), examples, 9, True, 3).batch([0], [5]).supervised.all()
    again = Batches(Sizes(), examples, 9, False, 3).batch([0, 3], [5, 6])
    assert all((a == b).all() for a, b in zip(vars(batch).values(), vars(again).values()) if isinstance(a, np.ndarray))
    cuts = {batches.batch([3], [number]).tokens.shape[1] for number in range(40)}
    assert cuts == {4, 8, 12}  # every canvas of the long answer comes up


def test_every_epoch_takes_each_example_once():
    epochs = [[order(7, 7 * epoch + i, 0) for i in range(7)] for epoch in range(3)]
    assert [sorted(one) for one in epochs] == [list(range(7))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_log_goes_on_and_draws(tmp_path):
    log = Log(tmp_path / "log.csv")
    for step in range(1, 6):
        log.add(step=step, seconds=step / 2, loss=1 / step, valid_loss=0.5 if step == 4 else None)
    again = Log(tmp_path / "log.csv", step=3)
    again.add(step=4, seconds=2.5, loss=0.25)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines[0] == ",".join(COLUMNS)
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    draw(log.rows, tmp_path / "curves.png")
    full = (tmp_path / "curves.png").read_bytes()
    draw([], tmp_path / "curves.png")
    assert len((tmp_path / "curves.png").read_bytes()) < len(full)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "log.csv"]


ANIMALS = "cat dog fox owl bear frog".split()
QUICKLY = ["--steps", "3", "--batch-size", "2", "--validate-every", "2", "--validate", "2", "--generate", "1"]


def data_in(folder, train=ANIMALS, valid=ANIMALS[:2]):
    """Words to be said twice."""
    for name, words in (("train", train), *([("valid", valid)] if valid else [])):
        lines = [json.dumps({"prompt": f"Say {word} twice.", "completion": f"{word} {word}"}) for word in words]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder)


def tune(*arguments):
    return CliRunner().invoke(main, ["tune", *map(str, arguments)])


def test_a_whole_run_from_the_command_line(tmp_path):
    """Files, what is printed, a YAML file, a stop that is gone on from, and refusals."""
    data, out, config = data_in(tmp_path), tmp_path / "out", tmp_path / "tune.yaml"
    config.write_text("rank: 2\nencoder-weight: 0\ntargets: [attention]\nseed: 5\n")
    told = tune(data, "--output", out, "--config", config, *QUICKLY)
    assert told.exit_code == 0, told.stderr
    assert told.stdout == ""
    assert "Canvases are filled with <pad> behind an answer; 6 samples to train on, 2 to validate;" in told.stderr
    assert "step 2 of 3, loss " in told.stderr and "% of the answers right" in told.stderr
    assert "expected: 'cat cat'" in told.stderr
    assert sorted(file.name for file in out.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "curves.png", "log.csv", "state.safetensors",
    ]  # fmt: skip
    rows = (out / "log.csv").read_text().splitlines()
    assert len(rows) == 4
    assert [row.split(",")[7] != "" for row in rows[1:]] == [False, True, True]
    held = json.loads((out / "adapter_config.json").read_text())
    assert (held["r"], held["lora_alpha"]) == (2, 32)
    assert tune(data, "--output", out).stderr.endswith(
        f"Error: {out} is not empty; give another --output, or go on with --resume.\n"
    )
    again = tune(data, "--output", out, "--config", config, *QUICKLY, "--resume")
    assert again.stderr.endswith(f"{out} is done already: 3 steps.\n")
    more = tune(data_in(tmp_path, ANIMALS[:3]), "--output", out, "--config", config, *QUICKLY, "--resume")
    assert "state.safetensors was trained with data " in more.stderr and more.exit_code == 1


def test_a_run_that_is_stopped_has_saved_and_goes_on_exactly(tmp_path):
    """As Ctrl-C stops it: after the step."""
    data = data_in(tmp_path, valid=[])
    method = Method(rank=2, steps=3, learning_rate=0.01, layers=1)

    def train(output, stop, resume=False):
        engine = mlx_dgemma.load(dtype="float32")
        plan = Plan(data, output, batch_size=1, encoder_weight=0.0, fill=0)
        return engine, [one.step for one in run_(engine, method, plan, resume, stop)]

    whole, steps = train(tmp_path / "whole", lambda: False)
    assert steps == [1, 2, 3]
    _, steps = train(tmp_path / "parts", lambda: True)
    assert steps == [1]
    held = (tmp_path / "parts" / "adapter_model.safetensors").read_bytes()
    rest, steps = train(tmp_path / "parts", lambda: False, resume=True)
    assert steps == [2, 3]
    assert (tmp_path / "parts" / "adapter_model.safetensors").read_bytes() != held
    parts, one = (tmp_path / name / "adapter_model.safetensors" for name in ("parts", "whole"))
    assert parts.read_bytes() == one.read_bytes()
    mine, theirs = weights(rest.model), weights(whole.model)
    assert all((mine[path] == theirs[path]).all() for path in mine)


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--variant", "google", "--fill", "4000"], "fill is 4000; it should be a token id below 2048."),
        (["--layers", "9"], "layers is 9; the model has 6."),
        (["--kind", "dora", "--targets", "experts"],
         "DoRA is not defined for experts here; leave experts out of --targets, or take lora."),
        (["--resume"], "OUT holds no state.safetensors to resume from; start anew without --resume."),
    ],
)  # fmt: skip
def test_what_a_run_refuses(tmp_path, arguments, sentence):
    out = tmp_path / "out"
    told = tune(data_in(tmp_path), "--output", out, *arguments)
    assert told.exit_code == 1
    last = told.stderr.splitlines()[-1]
    assert last == "Error: " + sentence.replace("OUT", str(out))
    assert not out.exists()


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_learnt():
    one = trainer(learning_rate=0.02)
    one.update([batch_of(0)])
    before = weights(one.model)
    one.objective = replace(one.objective, encoder_weight=float("nan"))
    told = refusal(DataError, one.update, [batch_of(1)])
    assert told == "The loss is nan and the gradients' norm nan at step 2; lower --learning-rate, which is 0.02."
    after = weights(one.model)
    assert all((before[path] == after[path]).all() for path in before)


def test_a_run_that_is_killed_can_be_gone_on_with(tmp_path):
    """Even before its first save, and where the end came between two files."""
    data, out = data_in(tmp_path, valid=[]), tmp_path / "out"
    engine = mlx_dgemma.load(dtype="float32")
    plan, method = Plan(data, out, batch_size=1, encoder_weight=0.0, fill=0), Method(rank=2, steps=2, layers=1)
    run = run_(engine, method, plan)
    next(run)
    run.close()
    assert (engine.model.training, engine.model._apply) == (False, Layer.__call__)
    assert "state.safetensors" in {file.name for file in out.iterdir()}
    again = run_(mlx_dgemma.load(dtype="float32"), method, plan, resume=True)
    assert [one.step for one in again] == [1, 2]
    (out / "adapter_model.safetensors").unlink()
    assert list(run_(mlx_dgemma.load(dtype="float32"), method, plan, resume=True)) == []
    assert (out / "adapter_model.safetensors").exists()


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_dgemma.tune.run.available", lambda: 2**20)
    engine, plan = mlx_dgemma.load(dtype="float32"), Plan(data_in(tmp_path), tmp_path / "out", batch_size=2)
    told = refusal(MemoryLimitError, list, run_(engine, Method(rank=2, steps=1), plan))
    assert told.startswith("Training needs about 0.")
    assert told.endswith(
        " GiB and this machine gives 0.0; lower --batch-size or --max-length, or try anyway with --ignore-memory."
    )
    assert not (tmp_path / "out").exists()


def test_a_broken_log_is_refused(tmp_path):
    file = tmp_path / "log.csv"
    file.write_text("step,loss\n1,a\n")
    assert refusal(DataError, Log, file, 3) == f"{file} is broken; remove it, and the curves begin anew."


def test_the_command_knows_every_objective_and_target():
    assert tuple(VARIANTS) == cli_tune.VARIANTS
    assert (*deltas.GROUPS, "self-conditioning") == cli_tune.TARGETS


def test_yaml_files_are_checked(tmp_path, monkeypatch):
    config = tmp_path / "tune.yaml"
    for text, sentence in (
        ("rank: 2.7", f"{config} sets rank to 2.7; it should be a whole number."),
        ("rank: [1]", f"{config} sets rank to [1]; it should be a whole number."),
        ("resume: 1", f"{config} sets resume to 1; it should be true or false."),
        ("targets: 3", f"{config} sets targets to 3; it should be a list of words."),
        ("output: 5", f"{config} sets output to 5; it should be a text."),
        (
            "learning-rate: 1e-4",
            f"{config} sets learning_rate to '1e-4'; it should be a number (YAML reads 1e-4 as a word: write 1.0e-4).",
        ),
        ("rnak: 3", f"{config} sets rnak, which is no option of tune; see mlx-dgemma tune --help."),
        ("- 3", f"{config} holds no names with values; write lines such as rank: 16."),
    ):
        config.write_text(text)
        told = tune(tmp_path, "--config", config)
        assert (told.exit_code, told.stderr) == (1, f"Error: {sentence}\n")
    monkeypatch.setenv("MLX_DGEMMA_MODEL", "somewhere")
    config.write_text("model: here")
    assert tune(tmp_path, "--config", config).stderr == (
        f"Error: {config} sets model, and so does $MLX_DGEMMA_MODEL; unset one of them.\n"
    )
    config.write_text("rank: [")
    assert tune(tmp_path, "--config", config).stderr.startswith(f"Error: {config} is not valid YAML (while parsing")


def test_pictures_and_padding_stay_with_their_sample(tmp_path):
    """A sample with a picture beside one without: the batch's loss is the mean of what each has alone."""
    square(RED).save(tmp_path / "red.png")
    seen = [{"type": "image", "image": "red.png"}, {"type": "text", "text": "What color is the shape?"}]
    lines = [
        {"messages": [{"role": "user", "content": seen}, {"role": "assistant", "content": "Scarlet."}]},
        {"prompt": "Say dog twice.", "completion": "dog dog"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    engine = mlx_dgemma.load(dtype="float32")
    batches = Batches(engine, read(engine, tmp_path / "train.jsonl"), 0, True, 0)
    both = batches.batch([0, 1], [0, 1])
    held = (both.tokens == engine.config.image_token_id).sum(axis=1)
    assert (both.features[0].shape[0], both.features[1]) == (held[0], None)
    assert held[0] > 0 and held[1] == 0
    noise = noise_of(both, VARIANTS["google"], 2048, mx.random.key(0))
    alone = []
    for i in range(2):
        own = Noise(noise.t[i : i + 1], noise.canvas[i : i + 1], noise.conditioned[i : i + 1])
        alone.append(loss(engine.model, batches.batch([i], [i]), own, VARIANTS["google"]))
    together = loss(engine.model, both, noise, VARIANTS["google"])
    for one, *each in zip(together, *alone):
        assert one.item() == pytest.approx(sum(part.item() for part in each) / 2, abs=1e-4)


@pytest.mark.parametrize(
    "rows, length, parts, recompute",
    [(1, 40, 1, True), (1, 40, 1, False), (2, 100, 1, True), (2, 100, 1, False), (5, 40, 2, False)],
)
def test_the_estimate_bounds_the_peak(rows, length, parts, recompute):
    """From above, and not by more than sixfold: it plans for a machine, it does not measure one."""
    engine = mlx_dgemma.load(dtype="float32")
    tokens = np.array(random_tokens(0, rows, length, vocab=2000)) + 20
    canvas = np.array(random_tokens(1, rows, 64, vocab=2000))
    batch = Batch(tokens, np.ones(tokens.shape, bool), canvas, np.ones(canvas.shape, bool))
    method = Method(rank=4, steps=10, recompute=recompute)
    one = Trainer(engine.model, method, VARIANTS["google"])
    one._cores = 2
    assert one.parts(rows, length) == parts
    held = sum(a.nbytes for a in flat(engine.model.parameters()).values())
    mx.synchronize()
    mx.clear_cache()
    base = mx.get_active_memory() - held
    mx.reset_peak_memory()
    for _ in range(2):
        one.update([batch])
    peak = one.peak_bytes - base
    one.done()
    needed = need(engine.checkpoint, method, rows, length + 64, one.trainable, held, parts).total
    assert peak <= needed <= 6 * peak


@pytest.mark.parametrize("name", ["google", "nemo"])
def test_parts_of_a_batch_in_processes_of_their_own_add_up_to_it(monkeypatch, name):
    whole, parted, again = (Trainer(small_model(0), Method(**QUICK), VARIANTS[name]) for _ in range(3))
    monkeypatch.setattr(trainer_module, "POSITIONS", 1)
    whole._cores, parted._cores, again._cores = 1, 2, 2
    batch = batch_of(0, 3)
    batch.real[0, :2] = batch.supervised[1, 2:] = False
    told = [[one.update([batch]) for _ in range(2)] for one in (whole, parted, again)]
    for one in (parted, again):
        one.done()
    mine, theirs, same = (weights(one.model) for one in (whole, parted, again))
    assert astuple(told[0][1]) == pytest.approx(astuple(told[1][1]), rel=1e-5)
    assert all(np.allclose(mine[path], theirs[path], atol=1e-5) for path in mine)
    assert told[1] == told[2] and all(np.array_equal(theirs[path], same[path]) for path in theirs)


def test_a_mistake_in_another_process_is_told_here(monkeypatch):
    one = trainer()
    monkeypatch.setattr(trainer_module, "POSITIONS", 1)
    one._cores = 2
    batch = replace(batch_of(0), features=[mx.zeros((1, 1)), None])
    assert "image placeholders" in refusal(PromptError, one.update, [batch])
    one._workers._processes[1].kill()
    assert refusal(MemoryLimitError, one.update, [batch_of(0)]) == (
        "A process that computed gradients has ended, as happens where memory runs out; "
        "lower --batch-size, and go on with --resume."
    )
    one.update([batch_of(0)])  # others take their places
    one.done()
