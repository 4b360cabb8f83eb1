"""Searched plans: trajectories, sensitivities, the knapsack, and conversions with a plan."""

import json
from itertools import product
from random import Random

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from mlx_dgemma.check.shapes import raw_config
from mlx_dgemma.checkpoint.build import build
from mlx_dgemma.checkpoint.folder import Checkpoint, parameter_shapes
from mlx_dgemma.checkpoint.memory import prefix_bytes
from mlx_dgemma.checkpoint.tokenizer import load_tokenizer
from mlx_dgemma.convert.cli import convert as command
from mlx_dgemma.convert.recipes import RECIPES, ByLayer, Quantization, unfolded, width_name, width_named
from mlx_dgemma.convert.search import plan, prompts, replay, sensitivity, trajectories, widths
from mlx_dgemma.convert.search.candidate import measured, rounded
from mlx_dgemma.convert.search.knapsack import Choice, best, bound, greedy
from mlx_dgemma.convert.search.search import size_of
from mlx_dgemma.convert.search.sensitivity import Costs, Sensitivity
from mlx_dgemma.convert.search.shelf import Shelf
from mlx_dgemma.convert.sources.opened import open_source
from mlx_dgemma.decoding.options import GenerationOptions
from mlx_dgemma.errors import CheckpointError, DataError, OptionError
from mlx_dgemma.model.config import ModelConfig
from mlx_dgemma.model.diffusion_gemma import DiffusionGemma

LAST = "model.decoder.layers.5."


@pytest.fixture(scope="module")
def shelf(demo):
    with open_source(demo) as source:
        yield Shelf(source)


@pytest.fixture(scope="module")
def recorded(shelf, demo) -> list[trajectories.Trajectory]:
    tokenizer = load_tokenizer(Checkpoint.open(demo))
    asked = [prompts.render(tokenizer, prompts.messages_of(text)) for text in ("Spell the word coin.", "Sort: 3, 1, 2")]
    return trajectories.record(
        shelf.trunk(), GenerationOptions(end_tokens=(1, 16), max_denoising_steps=3), asked, states=2
    )


# --- trajectories -------------------------------------------------------------------------------------------------


def test_a_replay_is_what_the_model_computes(shelf, recorded, demo):
    """Layer by layer over all states, and through the model state by state."""
    model, found = build(Checkpoint.open(demo), "float32"), replay.outputs(shelf.trunk(), shelf.layer, recorded)
    for one, (_, last) in zip(recorded, found):
        prefix = model.new_prefix()
        model.encode(mx.array(one.prefix)[None], prefix)
        for i, step in enumerate(one.steps):
            conditioning = mx.array(one.conditioning[i : i + 1]).astype(mx.float32) if step else None
            wanted = model.denoise(mx.array(one.canvases[i : i + 1]), prefix, conditioning)
            assert float(mx.abs(model.model.decoder.norm(last[i]) - wanted[0]).max()) < 1e-4


def test_trajectories_hold_first_and_last_steps_and_survive_the_disk(recorded, tmp_path):
    assert [one.steps[0] for one in recorded] == [0, 0]
    assert [one.steps.tolist() for one in recorded] == [[0], [0, 1, 2]]  # four states; one canvas settles at once
    assert all(one.text.any() and not one.text.all() for one in recorded)
    trajectories.save(tmp_path / "t.safetensors", recorded)
    again = trajectories.load(tmp_path / "t.safetensors")
    for one, other in zip(recorded, again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.zeros((1,))})
    with pytest.raises(CheckpointError, match="holds no trajectories"):
        trajectories.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    "lengths, total, counts", [([1, 1, 9, 3], 12, [1, 1, 7, 3]), ([9, 9], 4, [2, 2]), ([5, 1, 2], 9, [5, 1, 2])]
)
def test_what_short_trajectories_leave_goes_to_longer_ones(lengths, total, counts):
    assert trajectories.shared(lengths, total) == counts


def test_a_streamed_shelf_reads_the_same_layers(demo, shelf):
    with open_source(demo) as source:
        streamed = Shelf(source, keep=False)
        a, b = streamed.layer(0), shelf.layer(0)
        assert streamed.layer(0) is not a
        assert shelf.layer(0) is b
        assert mx.array_equal(a.experts.gate_up_proj.weight, b.experts.gate_up_proj.weight)


# --- sensitivities ------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_directions_have_the_covariance_of_the_fisher_information():
    """Among them those of a nearly certain position, which tokens drawn from it would seldom show."""
    p = mx.array([[0.7, 0.2, 0.1], [0.999, 0.0009, 0.0001]])
    made = mx.stack([sensitivity.fisher_direction(p, mx.random.key(i)) for i in range(4000)])
    expected = mx.stack([mx.diag(row) - row[:, None] * row[None] for row in p])
    found = mx.einsum("nri,nrj->rij", made, made) / len(made)
    assert (mx.abs(found - expected) <= 0.1 * mx.sqrt(mx.max(mx.abs(expected), axis=(1, 2), keepdims=True))).all()
    assert (mx.abs(found[1] - expected[1]) <= 0.1 * mx.abs(expected[1]).max()).all()
    assert float(mx.abs(made.sum(axis=-1)).max()) < 1e-5


def test_costs_foretell_the_divergence_and_a_stopped_run_goes_on(shelf, recorded, tmp_path, monkeypatch):
    """The last layer's maps and the embedding; the run is stopped behind them and started again."""
    tried = [Quantization(2), Quantization(8)]
    measure = Sensitivity(shelf, recorded, tmp_path, tried, samples=2)
    monkeypatch.setattr(measure, "_layer", lambda costs, index: (_ for _ in ()).throw(Stopped))
    with pytest.raises(Stopped):
        measure.run()
    monkeypatch.undo()
    layer = Sensitivity._layer

    def only_the_last(self, costs, index):
        if index < 5:
            raise Stopped
        layer(self, costs, index)

    monkeypatch.setattr(Sensitivity, "_layer", only_the_last)
    monkeypatch.setattr(sensitivity, "HELD", 64)  # measured trajectory by trajectory
    monkeypatch.setattr(replay, "embed", None)  # nothing is computed twice
    with pytest.raises(Stopped):
        Sensitivity(shelf, recorded, tmp_path, tried, samples=2).run()
    costs = sensitivity.known_costs(tmp_path)
    monkeypatch.undo()
    assert costs.layers == 5
    expected = measure.outputs()
    for path in (f"{LAST}experts.down_proj", f"{LAST}self_attn.k_proj"):

        def one(where, weight, path=path):
            return rounded(weight, tried[0], shelf.stored) if where == path else weight

        far, same = measured(shelf, one, recorded, expected)
        assert 0.2 < costs.modules[path]["2g64"] / far < 5, path
        assert 0.9 < same <= 1
        assert costs.modules[path]["8g64"] < costs.modules[path]["2g64"] / 50
    assert list(costs.modules[f"{LAST}router.proj"]) == ["8g64"]
    shares, rows = costs.experts[f"{LAST}experts.down_proj"], costs.rows[f"{LAST}experts.down_proj"]
    assert sum(shares["2g64"]) == pytest.approx(costs.modules[f"{LAST}experts.down_proj"]["2g64"])
    assert sum(rows) == 2 * sum(one.canvases.size + one.prefix.size for one in recorded)


def test_nothing_is_lost_where_nothing_is_rounded(shelf, recorded):
    expected = replay.outputs(shelf.trunk(), shelf.layer, recorded[:1])
    assert measured(shelf, lambda path, weight: weight, recorded[:1], expected) == (0.0, 1.0)


# --- the knapsack -------------------------------------------------------------------------------------------------


def test_the_knapsack_finds_what_trying_everything_finds():
    random = Random(0)
    for _ in range(40):
        modules = {
            f"m{i}": [
                Choice(str(bits), random.choice([100, 300, 1000]) * bits, random.random() * random.choice([1, 10, 100]))
                for bits in (2, 3, 4, 6)
            ]
            for i in range(4)
        }
        low, high = (sum(f(one.nbytes for one in some) for some in modules.values()) for f in (min, max))
        size = random.randint(low, high)
        wanted = min(
            sum(one.cost for one in some) for some in product(*modules.values()) if sum(o.nbytes for o in some) <= size
        )
        for find in (best, greedy):
            chosen = find(modules, size)
            assert sum(one.nbytes for one in chosen.values()) <= size
            assert sum(one.cost for one in chosen.values()) >= wanted - 1e-9
        assert sum(one.cost for one in best(modules, size).values()) == pytest.approx(wanted)
        assert bound(modules, size) <= wanted + 1e-9
    with pytest.raises(ValueError, match="the least"):
        best(modules, low - 1)


# --- plans and recipes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def release() -> dict[str, tuple[int, ...]]:
    return parameter_shapes(DiffusionGemma(ModelConfig.from_dict(raw_config("26b"))))


def test_recipes_for_macs_fit_them(release):
    """Without the vision tower's 1.1 GB, which its own line adds."""
    config, tower = ModelConfig.from_dict(raw_config("26b")), 1.15e9
    rest = prefix_bytes(config, 4096, 2) + 8 * 4 * config.canvas_length * config.text.vocab_size
    for name, size in {"mac-16gb": 16 * 2 / 3, "mac-24gb": 24 * 2 / 3, "mac-36gb": 36 * 3 / 4}.items():
        needed = RECIPES[name].nbytes(release) + tower + rest
        assert 0.97 < needed / (size * 2**30) < 1.01, name
        layers = {len(kind) for kind in RECIPES[name].kinds.values() if len(kind) > 1}
        assert layers <= {29, 30}


def test_a_plan_of_the_release_fills_its_size(release):
    tried = [Quantization(bits) for bits in (2, 3, 4, 6)] + [Quantization(8)]
    costs = {
        path: {width_name(one): 4.0**-one.bits * (1 + len(path) % 7) for one in widths.allowed(path, shape, tried)}
        for path, shape in widths.modules_of(release).items()
    }
    found, _ = plan.planned("small", release, costs, int(10.35e9))
    assert 0.99 < found.nbytes(release) / 10.35e9 <= 1
    with pytest.raises(OptionError, match=r"takes at least 7\.\d GB; ask for more"):
        plan.planned("too small", release, costs, 5 * 10**9)


def test_a_plan_survives_its_file_and_names_widths(tmp_path):
    modules = {"model.decoder.embed_tokens": width_named("6g32"), f"{LAST}mlp.up_proj": None}
    plan.save(tmp_path / "plan.json", plan.Plan("mine", modules=modules))
    again = plan.load(tmp_path / "plan.json")
    assert again.modules == modules
    assert again.requested(f"{LAST}mlp.up_proj") is None
    assert again.requested(f"{LAST}mlp.gate_proj") == Quantization(8)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(OptionError, match="is no plan"):
        plan.load(tmp_path / "other.json")
    recipe = ByLayer("two", Quantization(4), kinds=unfolded({"mlp.up_proj": "2g64 3g32*2"}))
    named = [width_name(recipe.requested(f"model.decoder.layers.{i}.mlp.up_proj")) for i in (0, 1, 2, 7)]
    assert named == ["2g64", "3g32", "3g32", "3g32"]
    with pytest.raises(OptionError, match="is no width"):
        width_named("4x64")


# --- the command --------------------------------------------------------------------------------------------------


def run(*arguments):
    return CliRunner().invoke(command, [str(one) for one in arguments])


def test_a_target_size_makes_a_checkpoint_of_that_size(demo, tmp_path, shelf, recorded):
    """With costs that were measured before, as a second size of the same search has them."""
    folder, asked = tmp_path / "found", tmp_path / "asked.txt"
    asked.write_text("Spell the word coin.\n")
    shapes = widths.modules_of(Checkpoint.open(demo).shapes)
    costs = {
        path: {width_name(one): 4.0**-one.bits for one in widths.allowed(path, shape)} for path, shape in shapes.items()
    }
    arguments = (demo, "--mlx-path", tmp_path / "out", "--search-path", folder, "--prompts", asked)
    assert run(*arguments, "--target-size", "1MB").exit_code == 2
    assert not folder.exists()
    with open_source(demo) as source:
        tokens = prompts.read(load_tokenizer(source.checkpoint), asked)
        from mlx_dgemma.convert.search import search as module

        folder.mkdir()
        module._claim(folder, source, tokens, widths.ALL, module.STATES, sensitivity.SAMPLES)
    trajectories.save(folder / module.TRAJECTORIES, recorded[:1])
    Sensitivity(shelf, recorded[:1], folder)._keep(Costs(modules=costs, layers=0), 0)
    done = run(*arguments, "--target-bits", "4.5")
    assert done.exit_code == 0, done.output
    assert "Plan of 3.8 MB, 4.50 bits per weight: KL " in done.stdout
    doubt = (
        "Only 0 of 1 prompts took several steps, so little is known of later states; with 20 or more such --prompts a "
        "plan can be better."
    )
    assert doubt in done.stderr
    assert doubt in (folder / "report.md").read_text()
    result = Checkpoint.open(tmp_path / "out")
    assert 4.45 < result.bits_per_weight <= 4.5
    stored = {one["bits"] for one in result.quantization.values() if isinstance(one, dict)}
    assert len(stored) > 2
    assert build(result, "float32").config.text.num_hidden_layers == 6
    text = (folder / "report.md").read_text()
    assert "| this plan | 3.8 MB |" in text
    assert "model.decoder.layers.3.mlp.up_proj" in text
    assert (folder / "report.svg").read_text().startswith("<svg")
    again = run(demo, "--mlx-path", tmp_path / "again", "--recipe", folder / "plan.json")
    assert again.exit_code == 0, again.output
    assert Checkpoint.open(tmp_path / "again").quantization == result.quantization
    other = run(demo, "--mlx-path", tmp_path / "no", "--search-path", folder, "--target-bits", "4")
    assert "belongs to a search with another source, other prompts or widths" in other.stderr
    assert not (tmp_path / "no").exists()
    json.loads((folder / "search.json").read_text())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--target-size", "big"), "--target-size is 'big'; it should be a size such as 11.5GB."),
        (("--target-size", "1GB", "--target-bits", "3"), "--target-size and --target-bits cannot be combined."),
        (("--target-bits", "3", "-q"), "--target-bits and -q cannot be combined."),
        (("--target-bits", "0"), "--target-bits is 0.0; it should be above 0, such as 3.6."),
        (("--prompts", "a.txt"), "--prompts needs --target-size, --target-bits or --rounding."),
        (("--target-bits", "3", "--q-bits", "3"), "--q-bits and a target cannot be combined."),
        (("--target-bits", "5", "--prompts", "nowhere.txt"), "nowhere.txt cannot be read"),
        (("--recipe", "nowhere.json"), "nowhere.json cannot be read"),
    ],
)
def test_mistakes_are_told(demo, tmp_path, arguments, message):
    done = run(demo, "--mlx-path", tmp_path / "out", *arguments)
    assert done.exit_code in (1, 2)
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_sizes_and_prompts_are_read(demo, tmp_path):
    assert [size_of(one) for one in ("11.5GB", "10GiB", "900 MB", "4200000")] == [
        11_500_000_000,
        10 * 2**30,
        9 * 10**8,
        4_200_000,
    ]
    tokenizer = load_tokenizer(Checkpoint.open(demo))
    assert len(prompts.bundled(tokenizer)) == len(prompts.BUNDLED)
    file = tmp_path / "p.jsonl"
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    file.write_text(json.dumps({"prompt": "Hi"}) + "\n\n" + json.dumps({"messages": turns}) + "\n")
    first, second = prompts.read(tokenizer, file)
    assert first == second
    file.write_text('{"question": 1}\n')
    with pytest.raises(DataError, match=r"p\.jsonl, line 1"):
        prompts.read(tokenizer, file)
