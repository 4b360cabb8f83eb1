"""The products that the tests compute with are those of the BLAS in MLX's wheel, bit for bit."""

import ctypes
import platform
from itertools import product
from pathlib import Path

import mlx
import mlx.core as mx
import numpy as np
import products
import pytest

ROWS_FOLLOW, COLUMNS_FOLLOW, PLAIN, TURNED = 101, 102, 111, 112
(*_, WHEELS) = [None, *Path(mlx.__path__[0]).parent.glob("mlx_cpu.libs/libblas-*.so*")]
SHAPES = [(1, 1, 1), (64, 96, 48), (1, 50, 30), (50, 1, 30), (17, 33, 65), (15, 4, 100), (16, 3, 0), (0, 4, 4)]


def computed(library, order, a_turned, b_turned, shape, alpha, beta):
    """alpha A B + beta C of random matrices."""
    random, (m, n, k) = np.random.default_rng(sum(shape)), shape
    a, b, c = (random.normal(size=size).astype(np.float32) for size in (m * k, k * n, m * n))
    rows = order == ROWS_FOLLOW
    steps = (k if rows == (a_turned == PLAIN) else m, n if rows == (b_turned == PLAIN) else k, n if rows else m)
    (a_at, b_at, c_at), steps = (ctypes.c_void_p(one.ctypes.data) for one in (a, b, c)), [max(one, 1) for one in steps]
    alpha, beta = ctypes.c_float(alpha), ctypes.c_float(beta)
    given = order, a_turned, b_turned, m, n, k, alpha, a_at, steps[0], b_at, steps[1], beta, c_at, steps[2]
    library.cblas_sgemm(*given)
    return c


@pytest.mark.skipif(products.library is None or WHEELS is None, reason="MLX's own products are used")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the wheel's products may add and multiply at once")
@pytest.mark.parametrize("shape", SHAPES)
def test_all_bits_are_those_of_the_wheels_products(shape):
    own, wheels = ctypes.CDLL(str(products.library)), ctypes.CDLL(str(WHEELS))
    ways = (ROWS_FOLLOW, COLUMNS_FOLLOW), (PLAIN, TURNED), (PLAIN, TURNED), (1, 0.3), (0, 1, 0.7)
    for order, a_turned, b_turned, alpha, beta in product(*ways):
        given = order, a_turned, b_turned, shape, alpha, beta
        assert computed(own, *given).tobytes() == computed(wheels, *given).tobytes(), given


@pytest.mark.skipif(products.library is None, reason="MLX's own products are used")
def test_mlx_computes_with_them():
    calls = ctypes.c_long.in_dll(ctypes.CDLL(str(products.library)), "calls")
    before = calls.value
    mx.eval(mx.ones((2, 3)) @ mx.ones((3, 2)))
    assert calls.value == before + 1
