"""Distillation: which answers are learned, the losses beside naive ones, and a run that resumes exactly."""

import json
from dataclasses import fields

import mlx.core as mx
import numpy as np
import pytest
from support import random_tokens, refusal, small_model
from training import QUICK, weights

import mlx_dgemma
from mlx_dgemma.adapters import deltas
from mlx_dgemma.cli.commands.distill import distill as command
from mlx_dgemma.errors import DataError, OptionError
from mlx_dgemma.tune.config import TrainerConfig
from mlx_dgemma.tune.quick import loss
from mlx_dgemma.tune.quick.answers import Answer, answer_together, fill_token, trusted, vote
from mlx_dgemma.tune.quick.config import METHOD, DistillConfig
from mlx_dgemma.tune.quick.distill import distill
from mlx_dgemma.tune.quick.loss import Distillation, StateBatch, StateBatches
from mlx_dgemma.tune.quick.prompts import Question, read_prompts
from mlx_dgemma.tune.quick.states import SOUND, Canvas, States, soundness
from mlx_dgemma.tune.trainer import Trainer


def distilled_model():
    """A small model with an adapter that changes denoising alone, and its trainer."""
    model, made = small_model(0), []
    method = TrainerConfig(**QUICK)
    deltas.add_denoising_adapter(model, lambda: made.append(Trainer(model, method, Distillation(0.5, 2.0))))
    for _, module in model.named_modules():
        if "lora_b" in module:  # zero at first
            module.lora_b = mx.array(np.random.default_rng(0).normal(size=module.lora_b.shape).astype(np.float32))
    return model, made[0]


def batch_of_states():
    """A noisy state, a later one with half of the weight, and one that keeps the model."""
    tokens, canvas = np.array(random_tokens(0, 3, 7)), np.array(random_tokens(1, 3, 4))
    mask = np.arange(7) >= np.array([0, 2, 1])[:, None]
    conditioning = np.random.default_rng(1).normal(size=(3, 4, 16)).astype(np.float16)
    conditioning[0] = 0
    return StateBatch(
        np.where(mask, tokens, 0), mask, canvas, np.array([1, 0, 0.5], np.float32), np.array(random_tokens(2, 3, 4)),
        np.arange(4) < np.array([[4], [2], [3]]), np.array([1, 0.5, 0], np.float32), np.array([False, True, True]),
        conditioning,
    )  # fmt: skip


def log_probs(model, batch, canvas, row):
    """[C, V] of one row by itself."""
    prefix = model.new_prefix(1)
    model.encode(mx.array(batch.tokens[row][batch.mask[row]][None]), prefix)
    conditioning = mx.array(batch.conditioning[row : row + 1]).astype(mx.float32)
    logits = np.array(model.logits(model.denoise(canvas[row : row + 1], prefix, conditioning))[0], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize("most_padded, groups", [(2.5, 1), (1.25, 2), (1.0, 3)])
def test_the_losses_are_those_of_a_naive_computation(monkeypatch, most_padded, groups):
    """Whether rows are padded to one length or computed in groups of like length."""
    monkeypatch.setattr(loss, "MOST_PADDED", most_padded)
    assert len(loss.alike(batch_of_states().mask.sum(1))) == groups
    model, trainer = distilled_model()
    batch, objective = batch_of_states(), trainer.objective
    noise = objective.draw(batch, 40, mx.random.key(3))
    assert (np.array(noise)[1] == batch.canvas[1]).all() and (np.array(noise)[0] != batch.canvas[0]).any()
    early = unsure = 0.0
    for row, count in ((0, 4), (1, 2)):
        own, at = log_probs(model, batch, noise, row)[:count], batch.target[row][:count]
        right = own.argmax(-1) == at
        early += batch.weight[row] * -own[np.arange(count), at].mean() / 3
        unsure += batch.weight[row] * (right * -(np.exp(own) * own).sum(-1)).mean() / 3
    frozen, own = log_probs(small_model(0), batch, noise, 2), log_probs(model, batch, noise, 2)
    divergence = (np.exp(frozen) * (frozen - own)).sum(-1).mean() / 3
    losses = [one.item() for one in objective.loss(model, batch, noise, (1.0, 1.0))]
    np.testing.assert_allclose(losses[1:], [early, unsure, divergence], rtol=2e-4, atol=1e-6)
    assert divergence > 1e-3 and losses[0] == pytest.approx(early + 0.5 * unsure + 2 * divergence, rel=2e-4)
    parts = objective.split(batch, noise, None, 2)
    sums = np.sum([[one.item() for one in objective.loss(model, *part)] for part in parts], axis=0)
    np.testing.assert_allclose(sums, losses, rtol=1e-4, atol=1e-6)


def test_rows_of_like_length_are_computed_together():
    lengths = np.array([10, 3, 25, 4, 24, 9, 1])
    groups = [lengths[rows].tolist() for rows in loss.alike(lengths)]
    assert groups == [[25, 24, 10], [9, 4], [3], [1]]
    assert loss.alike(np.array([7, 7])) and len(loss.alike(np.array([5]))) == 1


def test_certainty_counts_where_the_model_is_right():
    model, trainer = distilled_model()
    batch = batch_of_states()
    noise = trainer.objective.draw(batch, 40, mx.random.key(3))
    best = [log_probs(model, batch, noise, row).argmax(-1) for row in range(3)]
    sure = StateBatch(**{**vars(batch), "target": np.array(best, np.int32)})
    assert trainer.objective.loss(model, sure, noise, (1.0, 1.0)).certainty.item() > 0.01


def test_only_denoising_changes():
    model, _ = distilled_model()
    frozen, tokens = small_model(0), mx.array(random_tokens(0, 1, 7))
    prefixes = [one.new_prefix(1) for one in (model, frozen)]
    mine, theirs = (one.encode(tokens, prefix) for one, prefix in zip((model, frozen), prefixes))
    assert mx.array_equal(mine, theirs)
    canvas = mx.array(random_tokens(1, 1, 4))
    mine, theirs = (one.denoise(canvas, prefix) for one, prefix in zip((model, frozen), prefixes))
    assert mx.abs(mine - theirs).max().item() > 0.01
    with deltas.without_adapter(model):
        assert mx.array_equal(model.denoise(canvas, prefixes[0]), theirs)
    adapter = deltas.extract_adapter(model)
    assert adapter.denoise and not adapter.encode


def test_answers_that_agree_are_trusted():
    def answer(*tokens, log_prob=0.0):
        return Answer(((*tokens, 0, 0),), len(tokens), "", log_prob, 1, 64)

    best, votes = vote([answer(5), answer(6, log_prob=-1.0), answer(6, log_prob=-2.0)])
    assert (best.tokens, best.log_prob, votes) == ((6,), -1.0, 2)
    assert vote([answer(5, log_prob=-1.0), answer(6)])[0].tokens == (6,)
    assert trusted(["", "", ""], [2, 1, 2], 2, 0.9) == [True, False, True]
    assert trusted(["a", "a", "b", "b", "b"], [2, 2, 2, 1, 1], 2, 0.5) == [True, True, False, False, False]


def test_states_are_drawn_by_their_steps():
    """Early ones and canvases of many steps more often; some samples of what is learned are nearly clean instead."""
    known = Canvas("", "", [3, 4], [5, 6, 1, 0], 3, 1.0, first=0, steps=3)
    kept = Canvas("", "", [3], [7, 1, 0, 0], 2, 0.0, first=2, steps=1)
    seen = np.arange(8, dtype=np.int32).reshape(2, 4)
    states = States([known, kept], seen, np.ones((2, 4, 16), np.float16))
    batch = StateBatches(states, 0.25, 0).sample(range(400))
    assert vars(batch).keys() == vars(StateBatches(states, 0.25, 0).sample(range(400))).keys()
    own = batch.mask.sum(1) == 2
    clean = own & (batch.weight == 0)
    assert own.sum() == 300  # three steps, and one
    assert 50 < clean.sum() < 100 and batch.noised[clean].max() <= 0.3 and (batch.canvas[clean] == known.tokens).all()
    counts = [(own & ~clean & (batch.noised == 1)).sum(), *((batch.canvas == row).all(1).sum() for row in seen)]
    assert counts[0] > counts[1] > counts[2] > 10
    assert (batch.weight[~own] == 0).all() and (batch.noised[~own] == 1).all()
    assert (batch.supervised.sum(1) == np.where(own, 3, 2)).all()
    assert (batch.conditioned == (batch.conditioning != 0).any((1, 2))).all()


def test_a_text_that_contradicts_itself_is_not_sound(demo):
    engine = mlx_dgemma.load(dtype="float32")

    def least(question, text):
        prompt = engine.builder.prompt_tokens([{"role": "user", "content": question}]).tokens
        tokens = [*engine.tokenizer.encode(text, add_special_tokens=False), engine.builder.turn_end]
        return soundness(engine, prompt, tokens), prompt, tokens

    assert least("Sort these numbers: 41, 7, 23", "7, 23, 41")[0] > SOUND
    assert least("Sort these numbers: 41, 7, 23", "7, 41, 41")[0] < SOUND
    assert least("Sort these numbers: 41, 7, 23", "41, 7, 23")[0] < SOUND  # its first token is wrong already
    told, prompt, tokens = least("Tell a story about a cat named Leo.", "Once there was a cat named Leo. Leo lived")
    prefix = engine.model.new_prefix(1)
    logits = np.array(engine.model.logits(engine.model.encode(mx.array([prompt + tokens]), prefix))[0], np.float64)
    logits = logits[len(prompt) - 1 : -1]
    ratios = np.exp(logits[np.arange(len(tokens)), tokens] - logits.max(-1))
    assert told == pytest.approx(ratios.min(), rel=1e-4)


def test_an_answer_token_by_token_fills_canvases():
    answer = Answer(tuple((token,) for token in (5, 6, 7, 8, 9, 1)), 6, "", 0.0, 0, 0)
    assert answer.canvases(4, 3) == [[5, 6, 7, 8], [9, 1, 3, 3]]
    assert Answer(((5, 1, 8, 8),), 2, "", 0.0, 1, 4).canvases(4, 3) == [[5, 1, 8, 8]]  # what it says itself stays
    assert Answer(((5, 6, 7, 8), (1, 9, 9, 9)), 4, "", 0.0, 1, 4).canvases(4, 3) == [[5, 6, 7, 8]]


def test_a_causal_teacher_is_greedy_at_first_and_then_draws(demo):
    """Its answers are those of causal mode; what fills their canvases is what diffusion puts there."""
    engine = mlx_dgemma.load(dtype="float32")
    questions = [_question_of(engine, text) for text in ("Spell the word frog.", "Tell a story about a fox named Mia.")]
    ways = [{"mode": "speculative", "temperature": 0}, {"mode": "speculative", "temperature": 1}]
    for i, answer in enumerate(answer_together(engine, questions, [3, 4], ways=ways)):
        options = {**ways[i], "mode": "causal"}
        told = engine.generate(questions[i].messages, seed=3 + i, **options)
        assert list(answer.tokens)[:-1] == told.tokens and answer.tokens[-1] in engine.options.end_tokens
    (diffused,) = answer_together(engine, questions[:1], [0], exact=True)
    assert fill_token(engine, questions[0], 0) == diffused.blocks[0][-1]
    assert diffused.tokens == answer_together(engine, questions[:1], [0], ways=ways[:1])[0].tokens


def _question_of(engine, text):
    messages = [{"role": "user", "content": text}]
    return Question(text, messages, engine.builder.prompt_tokens(messages).tokens)


def test_prompts_are_read(tmp_path):
    engine = mlx_dgemma.load(dtype="float32")
    lines = tmp_path / "prompts.txt"
    lines.write_text("Say cat.\n\n  Say dog.\n")
    read = read_prompts(engine, lines)
    assert [(one.where, one.messages[0]["content"]) for one in read] == [
        ("prompts.txt, line 1", "Say cat."), ("prompts.txt, line 3", "Say dog."),
    ]  # fmt: skip
    records = tmp_path / "prompts.jsonl"
    answered = {"messages": [{"role": "user", "content": "Say cat."}, {"role": "assistant", "content": "cat"}]}
    records.write_text(json.dumps({**answered, "topic": 7}))
    one = read_prompts(engine, records, "topic")[0]
    assert (one.tokens, one.family) == (read[0].tokens, "7")
    for text, sentence in (
        ("{}", "This has neither of prompt and messages; give one of them."),
        ('{"prompt": " "}', "prompt is ' '; it should be a text."),
        ('{"prompt": "a", "images": ["a.png"]}', "This has pictures, which cannot be learned from here; leave it out."),
        ('{"prompt": "a"}', "This has no field topic, which is to name its family; add it, or leave the families out."),
    ):
        records.write_text(text)
        assert refusal(DataError, read_prompts, engine, records, "topic") == f"prompts.jsonl, line 1: {sentence}"
    lines.write_bytes(b"Say cat.\n\xff\n")
    told = "This is not UTF-8: byte 0 is 0xff; convert the file, for example with iconv."
    assert refusal(DataError, read_prompts, engine, lines) == f"prompts.txt, line 2: {told}"
    lines.write_text("\n")
    assert refusal(DataError, read_prompts, engine, lines) == "prompts.txt contains no prompts; write one a line."


def test_settings_are_checked(tmp_path):
    for changes, sentence in (
        ({"rounds": 0}, "rounds is 0; it should be at least 1."),
        ({"agree": 3}, "agree is 3, but best_of is 2; no more answers can agree than there are."),
        ({"clean": 2.0}, "clean is 2.0; it should be from 0 to 1."),
        ({"teacher": "me"}, "teacher is 'me'; it should be one of exact, default, causal."),
    ):
        assert refusal(OptionError, lambda c=changes: DistillConfig("a", tmp_path, **c)) == sentence


def test_help_tells_the_defaults():
    known = {one.name: one.default for one in fields(DistillConfig)} | vars(METHOD)
    told = {one.name: one.show_default for one in command.params if isinstance(getattr(one, "show_default", None), str)}
    numbers = {name: float(text) for name, text in told.items() if text.replace(".", "").isdigit()}
    assert len(numbers) > 15 and numbers == {name: known[name] for name in numbers}


@pytest.mark.parametrize("teacher, takes", [("default", 1), ("causal", 2)])
def test_a_stopped_run_continues_exactly(tmp_path, teacher, takes):
    """Stopped among the answers, among the states and while it trains; two rounds."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"Spell the word {word}." for word in ("cat", "owl", "fox")))
    method = TrainerConfig(rank=2, steps=3, learning_rate=0.01, layers=1)

    def run(output, stop_at=(), resume=False):
        engine, seen = mlx_dgemma.load(dtype="float32"), []
        plan = DistillConfig(
            str(prompts), output, 2, teacher, takes, takes, batch_size=1, held_back=1, answer_batch=1, states=2
        )
        for one in distill(engine, method, plan, resume, lambda: (seen or [""])[-1] in stop_at):
            seen.append(one.stage)
        return engine, seen

    whole, seen = run(tmp_path / "whole")
    assert list(dict.fromkeys(seen)) == ["expecting", "measuring", "answering", "recording", "training"]
    parts = tmp_path / "parts"
    for stage in ("answering", "recording", "training"):
        assert run(parts, (stage,), resume=parts.exists())[1][-1] == stage
    rest, seen = run(parts, resume=True)
    assert "answering" not in seen and "expecting" not in seen
    for name in ("adapter_model.safetensors", "report.json", "rounds/2/states.jsonl", "rounds/2/conditioning.f16"):
        assert (parts / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    mine, theirs = weights(rest.model), weights(whole.model)
    assert all((mine[path] == theirs[path]).all() for path in mine)
    assert len((parts / "log.csv").read_text().splitlines()) == 4
    assert run(parts, resume=True)[1] == []
