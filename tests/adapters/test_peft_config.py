"""adapter_config.json: what PEFT would change is read, what changes the computation is refused."""

import json
import math

import pytest
from peft_files import (
    THEIRS,
    Q,
    pair,
    same,
    save,
)
from support import refusal

from mlx_dgemma.adapters import peft, peft_config
from mlx_dgemma.adapters.peft_config import PeftConfig
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.folder import Checkpoint
from mlx_dgemma.errors import CheckpointError


@pytest.fixture(scope="module")
def shapes():
    return Checkpoint.open(DEMO).shapes


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
def test_only_modules_that_peft_targets_are_read(tmp_path, shapes, changes, read):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **changes)
    if read:
        assert peft.read(folder, shapes).denoise.keys() == {Q}
    else:
        assert refusal(CheckpointError, peft.read, folder, shapes) == (
            f"{folder}/adapter_model.safetensors contains {THEIRS}.decoder.layers.0.self_attn.q_proj.lora_A.weight, "
            "which adapter_config.json does not target, so PEFT ignores it; remove it or target it."
        )


def test_keys_without_effect_are_accepted(tmp_path, shapes):
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
def test_keys_that_change_the_computation_are_refused(tmp_path, shapes, key):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **{key: OTHERS[key]})
    assert refusal(CheckpointError, peft.read, folder, shapes) == (
        f"{folder}/adapter_config.json sets {key} to {json.dumps(OTHERS[key])}, which is not supported; "
        "train or export the adapter without it."
    )


@pytest.mark.parametrize("start", ["pissa", "olora", "corda", "loftq", "lora_ga"])
def test_initializations_that_change_the_base_are_refused(tmp_path, shapes, start):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), init_lora_weights=start)
    assert refusal(CheckpointError, peft.read, folder, shapes) == (
        f'{folder}/adapter_config.json sets init_lora_weights to "{start}", which is not supported; '
        "train or export the adapter without it."
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "has the peft_type 'LOHA'; only LORA is supported."),
        ({"peft_type": None}, "has the peft_type None; only LORA is supported."),
        ({"r": 0}, "sets r to 0; it should be a whole number of at least 1."),
        ({"r": True}, "sets r to true; it should be a whole number of at least 1."),
        ({"lora_alpha": "16"}, 'sets lora_alpha to "16"; it should be a number.'),
        ({"lora_alpha": math.inf}, "sets lora_alpha to Infinity; it should be a number."),
        ({"lora_alpha": 1e308}, "sets lora_alpha to 1e+308; it should be above 0 and at most 1000000."),
        ({"lora_alpha": -3}, "sets lora_alpha to -3; it should be above 0 and at most 1000000."),
        ({"lora_alpha": 10**400}, f"sets lora_alpha to 1{'0' * 199}...; it should be above 0 and at most 1000000."),
        ({"r": 10**5}, "sets r to 100000; it should be at most 65536."),
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
        (
            {"rank_pattern": {"a{99999999999999}": 4}},
            'sets rank_pattern to "a{99999999999999}"; it should be a regular expression (it repeats too often).',
        ),
        (
            {"alpha_pattern": {"(" * 3000 + ")" * 3000: 4}},
            f'sets alpha_pattern to "{"(" * 199}...; it should be a regular expression (it is nested too deeply).',
        ),
        (
            {"exclude_modules": r"(q)\1"},
            'sets exclude_modules to "(q)\\\\1"; it should be a regular expression '
            "(it has a backreference, which is not supported here).",
        ),
    ],
)
def test_values_of_a_wrong_type_are_refused(tmp_path, shapes, changes, message):
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **changes)
    assert refusal(CheckpointError, peft.read, folder, shapes) == f"{folder}/adapter_config.json {message}"


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"]
)
def test_patterns_on_which_re_hangs_are_matched(tmp_path, shapes, key):
    """They match nothing here, so that the adapter is read as without them, or is not targeted."""
    hangs = "(([a-z._0-9]+)+)+X"
    changes = {key: {hangs: 4} if key.endswith("pattern") and key != "layers_pattern" else hangs}
    if key == "layers_pattern":
        changes["layers_to_transform"] = [0]
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), **changes)
    if key in ("target_modules", "layers_pattern"):
        assert "does not target" in refusal(CheckpointError, peft.read, folder, shapes)
    else:
        assert len(peft.read(folder, shapes).denoise) == 1


def test_patterns_that_take_too_long_are_refused(tmp_path, shapes, monkeypatch):
    monkeypatch.setattr(peft_config, "MAX_STEPS", 50)
    folder = save(tmp_path, pair("decoder.layers.0.self_attn.q_proj"), target_modules="(.{0,60}){0,60}q_proj")
    assert refusal(CheckpointError, peft.read, folder, shapes) == (
        f'{folder}/adapter_config.json sets target_modules to "(.{{0,60}}){{0,60}}q_proj"; '
        "it should be a regular expression (it takes too many steps to match)."
    )


def test_a_layer_pattern_that_finds_several_numbers_is_refused(tmp_path, shapes):
    name = "decoder.layers.0.self_attn.q_proj"
    for pattern, layers, count in (("layers", [0], 1), ("lay[a-z]*", 0, 1), (".*", [0], 1)):
        folder = save(tmp_path / pattern, pair(name), layers_pattern=pattern, layers_to_transform=layers)
        assert len(peft.read(folder, shapes).denoise) == count
    config = PeftConfig.read(folder / peft.CONFIG)
    assert "which finds several layers in a.1.b.2.q_proj;" in refusal(CheckpointError, config.targets, "a.1.b.2.q_proj")
