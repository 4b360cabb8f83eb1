"""Calibration: replayed stop rules beside real answers, the file that loading reads, and the command."""

import json
import shutil
from itertools import product

import numpy as np
from click.testing import CliRunner
from support import refusal

import mlx_dgemma
from mlx_dgemma.checkpoint.calibration import Calibration, read_calibration, write_calibration
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.cli.info import describe
from mlx_dgemma.cli.main import main
from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.tune.quick import calibrate as module
from mlx_dgemma.tune.quick.answers import answer_together
from mlx_dgemma.tune.quick.prompts import read_prompts
from mlx_dgemma.tune.quick.replay import Rule, Trajectory, outcome

FITTED = Calibration({"entropy_bound": 0.2, "certainty_threshold": 0.5, "patience": 3}, 40, 0.99, 90.0, 240.0)


def test_replayed_rules_are_those_of_real_answers(tmp_path):
    engine, prompts = mlx_dgemma.load(dtype="float32"), tmp_path / "prompts.txt"
    prompts.write_text("Sort these numbers: 41, 7, 23, 90, 3, 55")
    questions, drafts = read_prompts(engine, prompts), []
    answer_together(engine, questions, [3], drafts, certainty_threshold=0, patience=0, canvas="full")
    known = [module._trajectories(engine, one, blocks, None) for one, blocks in zip(questions, drafts)]
    stops = set()
    for certainty, patience in ((0.0, 1), (2.5, 0)):
        real = answer_together(engine, questions, [3], certainty_threshold=certainty, patience=patience, canvas="full")
        for blocks, answer in zip(known, real):
            assert outcome(blocks, Rule(certainty, patience))[1] == answer.positions
            stops.add(answer.steps)
    assert len(stops) == 2 and len(drafts[0][0]) not in stops


def test_rules_on_a_trajectory_by_hand():
    argmax = np.array([[5, 6, 1, 9], [5, 7, 1, 8], [5, 7, 1, 3], [5, 6, 1, 3]])
    entropy = np.array([[0.1, 2, 0.1, 9], [0.1, 0.4, 0.1, 9], [0.0, 0.3, 0.1, 9], [0.0, 0.0, 0.0, 9]])
    one = Trajectory.of(argmax, entropy, [1], 4)
    assert one.unchanged.tolist() == [0, 0, 1, 0] and one.same.tolist() == [True, False, False, True]
    rules = {Rule(0.0, 0): 4, Rule(0.5, 0): 2, Rule(0.35, 0): 3, Rule(0.0, 1): 3, Rule(3.0, 1): 1}
    assert {rule: one.stop(rule) for rule in rules} == rules
    assert outcome([one, one], Rule(0.5, 0)) == (False, 16) and outcome([one], Rule(3.0, 0)) == (True, 4)


def test_loading_reads_the_file_and_what_is_given_wins(tmp_path, demo):
    folder = tmp_path / "model"
    shutil.copytree(demo, folder)
    own = mlx_dgemma.load(folder, dtype="float32").options
    write_calibration(folder, FITTED)
    engine = mlx_dgemma.load(folder, dtype="float32")
    options = engine.options
    assert (options.entropy_bound, options.certainty_threshold, options.patience) == (0.2, 0.5, 3)
    assert options.override(exact=True) == own.override(exact=True)
    assert options.override(fast=True) == own.override(fast=True)
    assert options.override(exact=True).override(exact=False) == options == options.override(fast=False)
    assert options.override(patience=1).patience == 1 and options.override(patience=1).certainty_threshold == 0.5
    told = "entropy_bound 0.2, certainty_threshold 0.5, patience 3, fitted on 40 prompts at 99.0 % agreement"
    assert f"The stop rules are calibrated: {told}." in engine.notes
    assert f"stop rules are calibrated: {told}" in describe(Checkpoint.open(folder))["notes"]


def test_broken_files_are_refused(tmp_path):
    file = tmp_path / "calibration.json"
    assert read_calibration(tmp_path) is None
    for changes, sentence in (
        ({"options": {"t_max": 1}}, f"{file} sets t_max, which is not fitted; calibrate again, or remove it."),
        ({"options": {"patience": 1.5}}, f"{file} sets patience to 1.5; it should be a whole number of at least 0."),
        ({"options": {"patience": "x"}}, f"{file} sets patience to 'x'; it should be a whole number of at least 0."),
        ({"prompts": None}, f"{file} has prompts None; it should be a number of at least 0."),
        ({"more": 1}, f"{file} should have options, prompts, agreement, positions, exact_positions; calibrate again, "
                      "or remove it."),
    ):  # fmt: skip
        file.write_text(json.dumps({**vars(FITTED), **changes}))
        assert refusal(CheckpointError, read_calibration, tmp_path) == sentence


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BOUNDS", (1, 2))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Spell the word owl.\n")
    refused = CliRunner().invoke(main, ["calibrate", str(prompts)])
    assert refused.stderr.endswith(
        "Error: The bundled demo is part of the package; give an --adapter to save beside, or --dry-run.\n"
    )
    done = CliRunner().invoke(main, ["calibrate", str(prompts), "--dry-run", "--json"])
    assert done.exit_code == 0, done.stderr
    fitted = json.loads(done.stdout)
    assert fitted["chosen"]["agreement"] >= 0.98
    assert len(fitted["tried"]) == 2 * len(list(product(module.CERTAINTIES, module.PATIENCES)))
    assert fitted["chosen"]["positions"] == min(one["positions"] for one in fitted["tried"] if one["agreement"] == 1)
    assert fitted["checked"]["positions"] % 64 == 0 and fitted["prompts"] == 1
