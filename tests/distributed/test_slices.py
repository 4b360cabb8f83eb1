"""What a rank reads of a file: its rows and columns, whatever lies in how many pieces."""

import mlx.core as mx
import pytest
from support import engine_of

from mlx_dgemma.checkpoint import slices
from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.checkpoint.headers import read_header
from mlx_dgemma.checkpoint.slices import Cut, Stored, held
from mlx_dgemma.cli.info import describe, lines
from mlx_dgemma.distributed.dealing import Span
from mlx_dgemma.errors import CheckpointError


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint32, mx.uint8])
@pytest.mark.parametrize("long", [1, 2**20])
def test_only_what_is_kept_is_read(tmp_path, monkeypatch, dtype, long):
    """Runs by themselves, or pieces of which columns are kept; a piece holds three rows."""
    monkeypatch.setattr(slices, "LONG", long)
    monkeypatch.setattr(slices, "PIECE", 3 * 6 * dtype.size)
    array = mx.arange(4 * 5 * 6).reshape(4, 5, 6).astype(dtype)
    mx.save_safetensors(str(tmp_path / "a.safetensors"), {"before": mx.zeros((3,)), "a": array})
    info = read_header(tmp_path / "a.safetensors")["a"]
    assert mx.array_equal(slices.read(info), array)
    assert mx.array_equal(slices.read(info, Cut(0, (Span(1, 3),))), array[1:3])
    two = slices.read(info, Cut(1, (Span(0, 1), Span(3, 5))))
    assert two.dtype == dtype and mx.array_equal(two, array[:, mx.array([0, 3, 4])])
    assert mx.array_equal(slices.read(info, Cut(-1, (Span(2, 5),))), array[..., 2:5])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_whole_groups_hold_the_same_numbers(bits):
    stored, cut = Stored(64, bits, "affine"), Cut(-1, (Span(64, 192),))
    parts = dict(zip(("weight", "scales", "biases"), mx.quantize(mx.random.normal((8, 192)), 64, bits)))
    kept = [held(array, cut, part, stored) for part, array in parts.items()]
    whole = mx.dequantize(*parts.values(), group_size=64, bits=bits)
    assert mx.array_equal(mx.dequantize(*kept, group_size=64, bits=bits), whole[:, 64:])


def test_info_tells_what_a_rank_holds():
    about = describe(engine_of(DEMO).checkpoint, ranks=2)
    told = about["ranks"]
    assert told["count"] == 2 and len(told["weights"]) == 2
    assert sum(told["replicated"].values()) < min(told["weights"]) < about["memory"]["weights"]
    text = "\n".join(lines(about))
    assert "2 ranks" in text and "on every rank" in text and "vision 2.3 MB" in text
    with pytest.raises(CheckpointError, match="cannot be dealt to 9 ranks"):
        describe(engine_of(DEMO).checkpoint, ranks=9)
