"""Reading the JSON files of a checkpoint: strict, and every error is one sentence."""

import copy
import json

import pytest
from support import small_config

from mlx_dgemma.errors import CheckpointError
from mlx_dgemma.model.config import GenerationConfig, ModelConfig, read_json


@pytest.fixture(scope="module")
def raw(demo):
    return json.loads((demo / "config.json").read_text())


@pytest.fixture(scope="module")
def raw_generation(demo):
    return json.loads((demo / "generation_config.json").read_text())


def message(function, *arguments):
    with pytest.raises(CheckpointError) as caught:
        function(*arguments)
    return str(caught.value)


def changed(raw, *path, **changes):
    """A copy of `raw` with some keys changed at `path`; a value of ... removes one."""
    raw = copy.deepcopy(raw)
    at = raw
    for key in path:
        at = at[key]
    at.update(changes)
    for key in [key for key, value in changes.items() if value is ...]:
        del at[key]
    return raw


def paths(raw, at=()):
    for key, value in raw.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from paths(value, (*at, key))


def test_the_demos_sizes(raw):
    config = ModelConfig.from_dict(raw)
    text = config.text
    assert (config.canvas_length, config.image_token_id, config.boi_token_id, config.eoi_token_id) == (64, 18, 17, 19)
    assert config.eos_token_ids == (1, 16)
    assert text.layer_types == ("sliding_attention",) * 5 + ("full_attention",)
    assert text.kv_shape("sliding_attention") == (2, 32)
    assert text.kv_shape("full_attention") == (1, 64)
    assert (text.sliding_window, text.num_experts, text.top_k_experts, text.vocab_size) == (96, 8, 2, 2048)
    assert text.full_rope == {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    assert text.sliding_rope == {"rope_type": "default", "rope_theta": 1e4}
    assert (config.vision.hidden_size, config.vision.standardize, config.vision.rope_theta) == (96, True, 100.0)


def test_a_text_config_of_required_keys_alone_is_the_release():
    required = {"sliding_window": 1024, "top_k_experts": 8}
    text = ModelConfig.from_dict({"model_type": "diffusion_gemma", "text_config": required}).text
    assert [i for i, kind in enumerate(text.layer_types) if kind == "full_attention"] == [5, 11, 17, 23, 29]
    assert text.kv_shape("sliding_attention") == (8, 256)
    assert text.full_rope["rope_theta"] == 1e6
    assert text.full_rope["partial_rotary_factor"] == 0.25
    assert text.sliding_rope["rope_theta"] == 1e4


def test_both_ways_to_write_the_full_layers_sizes_are_equal(raw):
    keys = {"global_head_dim": ..., "num_global_key_value_heads": ...}
    other = changed(raw, "text_config", **keys, per_layer_config={"5": {"head_dim": 64, "num_key_value_heads": 1}})
    assert ModelConfig.from_dict(other) == ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("own", "shape"),
    [
        ({"head_dim": 128, "num_key_value_heads": 3}, (3, 128)),
        ({"head_dim": 128}, (2, 128)),
        ({"num_key_value_heads": 1}, (1, 32)),
        ({}, (2, 32)),
    ],
)
def test_per_layer_config_holds_what_differs_from_the_sliding_layers(raw, own, shape):
    """As Transformers writes and reads it: beside it the global keys mean nothing, and equal sizes are left out."""
    for keys in ({}, {"global_head_dim": ..., "num_global_key_value_heads": ...}):
        other = changed(raw, "text_config", **keys, per_layer_config={"5": own})
        assert ModelConfig.from_dict(other).text.kv_shape("full_attention") == shape


def test_an_empty_per_layer_config_gives_all_layers_one_size(raw):
    other = changed(raw, "text_config", per_layer_config={})
    assert ModelConfig.from_dict(other).text.kv_shape("full_attention") == (2, 32)


def test_without_any_global_key_full_layers_have_the_sliding_layers_heads(raw):
    other = changed(raw, "text_config", num_global_key_value_heads=None, global_head_dim=16)
    assert ModelConfig.from_dict(other).text.kv_shape("full_attention") == (2, 16)


@pytest.mark.parametrize(
    "per_layer",
    [{"4": {"head_dim": 64}}, {"5": {"head_dim": 64}, "0": {"head_dim": 64}}],
)
def test_per_layer_config_must_be_about_the_full_layers(raw, per_layer):
    assert message(ModelConfig.from_dict, changed(raw, "text_config", per_layer_config=per_layer)) == (
        "config.json (text_config) has a per_layer_config that does not give all full layers [5] one size."
    )


def test_full_layers_of_several_sizes_are_refused():
    raw = small_config(("full_attention", "full_attention"))
    raw["text_config"]["per_layer_config"] = {"0": {"head_dim": 8}, "1": {"head_dim": 16}}
    assert message(ModelConfig.from_dict, raw) == (
        "config.json (text_config) has a per_layer_config that does not give all full layers [0, 1] one size."
    )


def test_an_unknown_key_in_per_layer_config(raw):
    other = changed(raw, "text_config", per_layer_config={"5": {"head_dim": 64, "window": 3}})
    assert message(ModelConfig.from_dict, other) == (
        "config.json (text_config) has the unknown key 'window' in per_layer_config."
    )


@pytest.mark.parametrize(
    ("path", "where"),
    [
        ((), "config.json"),
        (("text_config",), "config.json (text_config)"),
        (("vision_config",), "config.json (vision_config)"),
    ],
)
def test_an_unknown_key_is_an_error_with_its_name(raw, path, where):
    assert message(ModelConfig.from_dict, changed(raw, *path, attention_sinks=4)) == (
        f"{where} has the unknown key 'attention_sinks' = 4, which may change the computation; "
        "remove it if you know that it does not."
    )
    ModelConfig.from_dict(changed(raw, *path, attention_sinks=None))  # a null counts as missing


def test_an_unknown_key_in_rope_parameters(raw):
    other = changed(raw, "text_config", "rope_parameters", "full_attention", beta_fast=32)
    assert message(ModelConfig.from_dict, other) == (
        "config.json (text_config) has the unknown key 'beta_fast' = 32 in rope_parameters."
    )
    other = changed(raw, "text_config", "rope_parameters", middle={})
    assert message(ModelConfig.from_dict, other) == (
        "config.json (text_config) has the unknown key 'middle' in rope_parameters."
    )


@pytest.mark.parametrize(("layer", "kind"), [("full_attention", "proportional"), ("sliding_attention", "default")])
def test_a_different_rope_type_is_refused(raw, layer, kind):
    other = changed(raw, "text_config", "rope_parameters", layer, rope_type="yarn")
    assert message(ModelConfig.from_dict, other) == (
        f"config.json (text_config) has rope_type = 'yarn', but only {kind!r} is computed there."
    )


def test_rope_factors_that_are_not_computed_are_refused(raw):
    other = changed(raw, "text_config", "rope_parameters", "full_attention", factor=8.0)
    assert "factors are not computed." in message(ModelConfig.from_dict, other)
    other = changed(raw, "text_config", "rope_parameters", "sliding_attention", partial_rotary_factor=0.5)
    assert "factors are not computed." in message(ModelConfig.from_dict, other)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_a_rotary_share_outside_of_the_head_is_refused(raw, share):
    other = changed(raw, "text_config", "rope_parameters", "full_attention", partial_rotary_factor=share)
    assert message(ModelConfig.from_dict, other) == (
        f"config.json (text_config) has partial_rotary_factor = {share}, which should be from 0 to 1."
    )


def test_heads_that_do_not_turn_in_pairs_are_refused(raw):
    assert message(ModelConfig.from_dict, changed(raw, "text_config", head_dim=33)) == (
        "config.json (text_config) has head_dim = 33, which RoPE cannot turn in pairs; it should be even."
    )
    assert "has global_head_dim = 5, " in message(ModelConfig.from_dict, changed(raw, "text_config", global_head_dim=5))
    assert message(ModelConfig.from_dict, changed(raw, "vision_config", head_dim=22)) == (
        "config.json (vision_config) has head_dim = 22, which RoPE cannot turn in pairs along two axes; "
        "it should be a multiple of 4."
    )


# Keys that no tensor's shape pins.


@pytest.mark.parametrize("key", ["sliding_window", "top_k_experts"])
@pytest.mark.parametrize("value", [..., None])
def test_a_key_that_readers_default_differently_is_required(raw, key, value):
    assert message(ModelConfig.from_dict, changed(raw, "text_config", **{key: value})) == (
        f"config.json (text_config) lacks {key}, which no tensor tells; add it or download it again."
    )


def test_other_keys_that_no_shape_pins_have_the_defaults_of_transformers(raw):
    """Facts of Transformers 5.24's configuration classes."""
    keys = ("rms_norm_eps", "final_logit_softcapping", "use_bidirectional_attention", "rope_parameters")
    config = ModelConfig.from_dict(changed(raw, "text_config", **dict.fromkeys(keys, ...)))
    assert (config.text.rms_norm_eps, config.text.final_logit_softcapping) == (1e-6, 30)
    assert config.text.use_bidirectional_attention is None
    assert config.text.sliding_rope == {"rope_type": "default", "rope_theta": 1e4}
    assert config.text.full_rope == {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25}
    keys = ("rms_norm_eps", "rope_parameters", "pooling_kernel_size", "standardize", "use_clipped_linears")
    vision = ModelConfig.from_dict(changed(raw, "vision_config", **dict.fromkeys(keys, ...))).vision
    assert (vision.rms_norm_eps, vision.rope_theta, vision.pooling_kernel_size) == (1e-6, 100, 3)
    assert (vision.standardize, vision.use_clipped_linears) == (False, False)
    assert ModelConfig.from_dict(changed(raw, canvas_length=...)).canvas_length == 256


def test_a_full_layers_share_is_the_whole_head_where_rope_parameters_do_not_tell(raw):
    other = changed(raw, "text_config", "rope_parameters", "full_attention", partial_rotary_factor=...)
    assert ModelConfig.from_dict(other).text.rope("full_attention") == (1e6, 32)


@pytest.mark.parametrize(
    ("path", "key", "noun"),
    [
        (("text_config",), "final_logit_softcapping", "a number"),
        (("text_config",), "rms_norm_eps", "a number"),
        ((), "canvas_length", "a whole number"),
    ],
)
def test_a_null_where_a_number_is_needed(raw, path, key, noun):
    assert f"{key} = None, which should be {noun}." in message(
        ModelConfig.from_dict, changed(raw, *path, **{key: None})
    )


def test_rope_parameters_that_are_half_given(raw):
    other = changed(raw, "text_config", "rope_parameters", "full_attention", rope_theta=...)
    assert message(ModelConfig.from_dict, other).endswith("without rope_theta; add it.")
    other = changed(raw, "text_config", "rope_parameters", full_attention=...)
    expected = "config.json (text_config) has rope_parameters without full_attention, which it has layers of; add it."
    assert message(ModelConfig.from_dict, other) == expected
    assert message(ModelConfig.from_dict, changed(raw, "text_config", rope_parameters={})) == expected


@pytest.mark.parametrize(("key", "value"), [("sliding_window", 0), ("top_k_experts", 0), ("top_k_experts", 9)])
def test_sizes_that_nothing_can_be_computed_with(raw, key, value):
    assert f"{key} = {value}, which should be " in message(
        ModelConfig.from_dict, changed(raw, "text_config", **{key: value})
    )


@pytest.mark.parametrize(
    ("key", "value", "computed"),
    [
        ("attention_bias", True, False),
        ("attention_k_eq_v", False, True),
        ("enable_moe_block", False, True),
        ("hidden_activation", "silu", "gelu_pytorch_tanh"),
        ("hidden_size_per_layer_input", 256, 0),
        ("num_kv_shared_layers", 2, 0),
        ("tie_word_embeddings", False, True),
        ("use_double_wide_mlp", True, False),
    ],
)
def test_a_known_key_with_another_value_than_the_computed_one(raw, key, value, computed):
    assert message(ModelConfig.from_dict, changed(raw, "text_config", **{key: value})) == (
        f"config.json (text_config) has {key} = {value!r}, but this model is only computed with {computed!r}."
    )
    ModelConfig.from_dict(changed(raw, "text_config", **{key: computed}))


@pytest.mark.parametrize(
    ("key", "value", "noun"),
    [
        ("hidden_size", 1.5, "a whole number"),
        ("hidden_size", "8", "a whole number"),
        ("rms_norm_eps", True, "a number"),
    ],
)
def test_a_value_of_a_wrong_type(raw, key, value, noun):
    assert message(ModelConfig.from_dict, changed(raw, "text_config", **{key: value})) == (
        f"config.json (text_config) has {key} = {value!r}, which should be {noun}."
    )


def test_any_value_in_a_config_is_read_or_refused_in_one_sentence(raw, raw_generation):
    """Every key takes values of wrong types, one key after the other."""
    for whole, read in ((raw, ModelConfig.from_dict), (raw_generation, lambda r: GenerationConfig.from_dict(r, (1,)))):
        for path in paths(whole):
            for value in ("x", -1, 0, 1.5, None, [], ["x"], {}, {"a": 1}, True):
                try:
                    read(changed(whole, *path[:-1], **{path[-1]: value}))
                except CheckpointError as error:
                    assert "\n" not in str(error)
                    assert str(error).endswith(".")


def test_layer_types_must_fit_the_number_of_layers(raw):
    assert message(ModelConfig.from_dict, changed(raw, "text_config", num_hidden_layers=7)) == (
        "config.json (text_config) has layer_types for 6 layers (full_attention, sliding_attention) and "
        "num_hidden_layers = 7; they should agree and name sliding_attention or full_attention."
    )
    other = changed(raw, "text_config", layer_types=["linear_attention"] * 6)
    assert "(linear_attention)" in message(ModelConfig.from_dict, other)


def test_a_different_bidirectional_attention_is_refused(raw):
    other = changed(raw, "text_config", use_bidirectional_attention="all")
    assert message(ModelConfig.from_dict, other) == (
        "config.json (text_config) has use_bidirectional_attention = 'all', but only 'vision' or null is computed."
    )


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("llama", ""),
        (None, ""),
        ("gemma4", " (the autoregressive Gemma 4: mlx-lm runs it)"),
        ("gemma4_text", " (the autoregressive Gemma 4: mlx-lm runs it)"),
    ],
)
def test_a_different_model_type_is_refused(raw, kind, hint):
    assert message(ModelConfig.from_dict, changed(raw, model_type=kind)) == (
        f"This checkpoint's model_type is {kind!r}{hint}; mlx-dgemma runs 'diffusion_gemma' only."
    )


def test_audio_is_refused(raw):
    assert message(ModelConfig.from_dict, changed(raw, audio_config={"hidden_size": 4})) == (
        "config.json has an audio_config, but audio is not a modality of DiffusionGemma."
    )
    assert ModelConfig.from_dict(changed(raw, audio_config={})) == ModelConfig.from_dict(raw)


def test_without_a_vision_config_the_model_has_no_tower(raw):
    assert ModelConfig.from_dict(changed(raw, vision_config=...)).vision is None
    assert ModelConfig.from_dict(changed(raw, vision_config=None)).vision is None


def test_end_tokens_of_the_config(raw):
    assert ModelConfig.from_dict(changed(raw, eos_token_id=7)).eos_token_ids == (7,)
    assert ModelConfig.from_dict(changed(raw, eos_token_id=...)).eos_token_ids == (1,)  # the text config's
    other = changed(changed(raw, eos_token_id=...), "text_config", eos_token_id=5)
    assert ModelConfig.from_dict(other).eos_token_ids == (5,)
    assert message(ModelConfig.from_dict, changed(raw, eos_token_id="x")) == (
        "eos_token_id is 'x'; it should be token ids."
    )


# generation_config.json


def test_the_demos_generation_config(raw_generation):
    assert GenerationConfig.from_dict(raw_generation, (99,)) == GenerationConfig(
        256, 48, 0.1, 0.4, 0.8, 1, 0.005, (1, 16, 9)
    )


def test_the_generation_configs_end_tokens_win(raw_generation):
    assert GenerationConfig.from_dict(changed(raw_generation, eos_token_id=3), (99,)).eos_token_ids == (3,)
    assert GenerationConfig.from_dict(changed(raw_generation, eos_token_id=...), (98, 99)).eos_token_ids == (98, 99)
    assert GenerationConfig.from_dict({}, (7,)) == GenerationConfig(eos_token_ids=(7,))


def test_every_setting_of_the_generation_config_is_taken(raw_generation):
    own = changed(
        raw_generation,
        max_new_tokens=9,
        max_denoising_steps=8,
        sampler_config={"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.7},
        t_min=0.1,
        t_max=1,
        stability_threshold=2,
        confidence_threshold=0.3,
    )
    assert GenerationConfig.from_dict(own, ()) == GenerationConfig(9, 8, 0.7, 0.1, 1, 2, 0.3, (1, 16, 9))


def test_an_unknown_generation_setting_or_sampler_is_an_error(raw_generation):
    assert message(GenerationConfig.from_dict, changed(raw_generation, remasking="low"), ()) == (
        "generation_config.json has the unknown key 'remasking' = 'low', which may change the computation; "
        "remove it if you know that it does not."
    )
    other = changed(raw_generation, sampler_config={"_cls_name": "ConfidenceSamplerConfig", "threshold": 0.9})
    assert message(GenerationConfig.from_dict, other, ()) == (
        "generation_config.json asks for the sampler ConfidenceSamplerConfig with ['threshold'], "
        "but only EntropyBoundSamplerConfig with entropy_bound is known."
    )


# JSON files


def test_a_missing_file(tmp_path):
    path = tmp_path / "config.json"
    assert message(read_json, path) == f"{path} is missing; point at a folder that holds a whole checkpoint."


def test_a_file_that_is_not_json(tmp_path):
    path = tmp_path / "config.json"
    path.write_text('{"model_type": ')
    assert message(read_json, path) == (
        f"{path} cannot be read as JSON (Expecting value: line 1 column 16 (char 15)); download it again."
    )


def test_a_file_that_holds_no_object(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[]")
    assert message(read_json, path) == f"{path} does not hold a JSON object; download it again."
