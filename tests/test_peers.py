"""What the benches ask of other runtimes, for every version that they run on; no runtime is imported."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.append(str(Path(__file__).parent.parent / "bench"))

from peers import cached_layers


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # until Transformers 5.23, and since 5.24
def test_the_cache_of_a_decoder_call_is_found_under_either_name(name):
    assert cached_layers({"decoder_input_ids": None, name: SimpleNamespace(layers=["first"])}) == ["first"]
