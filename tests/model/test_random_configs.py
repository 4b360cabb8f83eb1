"""Random small configurations against outputs of Transformers that `bench/random_configs.py` stored."""

import numpy as np
import pytest
from stored_configs import cases, computed, model_of

BOUND = 1e-4
CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["seed"]))
def test_a_random_configuration_equals_transformers(case):
    found = computed(model_of(case["config"], case["seed"]), case["given"])
    assert found.keys() == case["expected"].keys()
    for name, expected in case["expected"].items():
        assert np.abs(found[name] - np.asarray(expected)).max() < BOUND, name


def test_the_stored_configurations_are_of_every_kind():
    assert len(CASES) == 40
    texts = [case["config"]["text_config"] for case in CASES]
    assert any("per_layer_config" in text for text in texts)
    assert any("head_dim" not in one for text in texts for one in text.get("per_layer_config", {}).values())
    assert any(text["layer_types"][-1] == "sliding_attention" for text in texts)
    assert any(
        int(text["rope_parameters"]["full_attention"]["partial_rotary_factor"] * text.get("global_head_dim", 0)) % 2
        for text in texts
    )
    assert {"pixels", "mask"} <= {name for case in CASES for name in case["given"]}
