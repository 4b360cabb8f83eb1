"""Products of float32 matrices for the tests on Linux, ten times as fast as those of the BLAS in MLX's wheel.

That one is the reference BLAS; it took most of the time of tests. Here is its `cblas_sgemm` with blocks in registers:
each number is the sum of the same products in the same order, and `test_products.py` compares all bits. It must be
imported before MLX is loaded; where there is no g++ the tests run slowly and test the same.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = r"""
#include <stdlib.h>
#include <string.h>

enum { ROWS = 16, COLUMNS = 4 };  // of a block of the result
typedef float Half __attribute__((vector_size(2 * ROWS), aligned(4)));

// Columns of x, as rows of `width` numbers; those that are missing are zeros.
static void pack(float* to, const float* x, long row, long column, int have, int width, int depth, float by) {
  for (int i = 0; i < width; i++)
    for (int l = 0; l < depth; l++) to[(long)l * width + i] = i < have ? by * x[i * column + l * row] : 0;
}

extern "C" long calls;
long calls;

extern "C" void cblas_sgemm(int order, int of_a, int of_b, int m, int n, int k, float alpha, const float* a, int a_step,
                            const float* b, int b_step, float beta, float* c, int c_step) {
  calls++;
  if (order == 101) {  // rows follow each other: the transposed product of what is given
    const float* other = a; a = b; b = other;
    int step = a_step; a_step = b_step; b_step = step;
    int of = of_a; of_a = of_b; of_b = of;
    int size = m; m = n; n = size;
  }
  if (m <= 0 || n <= 0 || ((alpha == 0 || k <= 0) && beta == 1)) return;
  bool a_turned = of_a != 111, b_turned = of_b != 111, by_dots = a_turned;  // as the reference orders its loops
  int depth = alpha == 0 || k < 0 ? 0 : k, a_blocks = (m + ROWS - 1) / ROWS;
  float* packed = (float*)aligned_alloc(64, ((size_t)a_blocks * ROWS + ROWS) * (depth + 1) * 4);
  float* right = packed + (size_t)a_blocks * ROWS * (depth + 1);
  for (int i = 0; i < a_blocks; i++) {
    int have = m - i * ROWS < ROWS ? m - i * ROWS : ROWS;
    if (have < ROWS || a_turned)
      pack(packed + (size_t)i * ROWS * depth, a + (a_turned ? (long)i * ROWS * a_step : i * ROWS),
           a_turned ? 1 : a_step, a_turned ? a_step : 1, have, ROWS, depth, 1);
  }
  for (int j = 0; j < n; j += COLUMNS) {
    int columns = n - j < COLUMNS ? n - j : COLUMNS;
    pack(right, b + (b_turned ? j : (long)j * b_step), b_turned ? b_step : 1, b_turned ? 1 : b_step, columns, COLUMNS,
         depth, by_dots ? 1 : alpha);
    for (int i = 0; i < a_blocks; i++) {
      int rows = m - i * ROWS < ROWS ? m - i * ROWS : ROWS;
      float sums[COLUMNS][ROWS] __attribute__((aligned(64))) = {};
      float* to = c + (long)j * c_step + i * ROWS;
      if (!by_dots && beta != 0)
        for (int y = 0; y < columns; y++)
          for (int x = 0; x < rows; x++) sums[y][x] = beta * to[y * (long)c_step + x];
      bool there = rows == ROWS && !a_turned;  // a block that needs no copy
      const float* left = there ? a + i * ROWS : packed + (size_t)i * ROWS * depth;
      long left_step = there ? a_step : ROWS;
      const float* one = right;
      Half* held = (Half*)sums;
      Half a0 = held[0], b0 = held[1], a1 = held[2], b1 = held[3];
      Half a2 = held[4], b2 = held[5], a3 = held[6], b3 = held[7];
      for (int l = 0; l < depth; l++, left += left_step, one += COLUMNS) {
        Half x = *(const Half*)left, y = *(const Half*)(left + ROWS / 2);
        a0 += x * one[0]; b0 += y * one[0];
        a1 += x * one[1]; b1 += y * one[1];
        a2 += x * one[2]; b2 += y * one[2];
        a3 += x * one[3]; b3 += y * one[3];
      }
      held[0] = a0; held[1] = b0; held[2] = a1; held[3] = b1; held[4] = a2; held[5] = b2; held[6] = a3; held[7] = b3;
      for (int y = 0; y < columns; y++)
        for (int x = 0; x < rows; x++) {
          float* at = to + y * (long)c_step + x;
          *at = !by_dots ? sums[y][x] : beta == 0 ? alpha * sums[y][x] : alpha * sums[y][x] + beta * *at;
        }
    }
  }
  free(packed);
}
"""


COMMAND = ["g++", "-O3", "-march=native", "-ffp-contract=off", "-shared", "-fPIC", "-w", "-Wl,--as-needed"]


def built() -> Path | None:
    """The library, compiled once for this machine; None where MLX has another BLAS or there is no compiler."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return None
    folder = Path(tempfile.gettempdir()) / f"mlx-dgemma-products-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    made = folder / f"{hashlib.sha256(repr((SOURCE, COMMAND, processor)).encode()).hexdigest()[:24]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            code, new = Path(own, "products.cpp"), Path(own, "products.so")
            code.write_text(SOURCE)
            subprocess.run([*COMMAND, str(code), "-o", str(new)], check=True)
            new.replace(made)
    return made


library = None if "mlx.core" in sys.modules else built()
if library is not None:
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # where MLX's libraries look first
    if str(library) not in (before := os.environ.get("LD_PRELOAD", "")):  # of processes that tests start
        os.environ["LD_PRELOAD"] = f"{library} {before}".strip()
