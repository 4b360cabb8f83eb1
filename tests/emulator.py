"""The custom kernels on the CPU: their bodies compiled as C++, the threads of a group run as fibers.

A fiber runs until it reaches a barrier or a function of its wave; then the next one runs. Threads of a group that do
not all reach the same barriers, and reads or writes outside of an array, end the process. A fiber serves all groups:
it begins by `swapcontext` and goes on by `_longjmp`, which makes no system call. Headers of C alone compile sooner.
"""

import ctypes
import hashlib
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_dgemma.model.kernels import sources

PRELUDE = r"""
#include <math.h>
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

struct bfloat16 {
  uint16_t bits = 0;
  bfloat16() = default;
  explicit bfloat16(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    bits = x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  }
  explicit operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float x;
    memcpy(&x, &u, 4);
    return x;
  }
};
using float16 = _Float16;
using float32 = float;

static int current, finished, threads, started;
static ucontext_t first, start;
static jmp_buf scheduler, fibers[1024];
static char stacks[1024][1 << 16];
static float floats[1024];
static int ints[1024];

static void pause() {
  if (!_setjmp(fibers[current])) _longjmp(scheduler, 1);
}

template <typename X> struct Array {
  X* data;
  long size;
  X& operator[](long i) const {
    if (i < 0 || i >= size) { fprintf(stderr, "index %ld of an array of %ld\n", i, size); abort(); }
    return data[i];
  }
  X* operator+(long i) const { return &(*this)[i]; }
};
template <typename T> struct Four { T x[4]; };

#define GLOBAL
#define SHARED static
#define DEVICE static inline
#define SYNC() pause()
template <typename X, typename F> X of_wave(X* buffer, X x, F join) {
  buffer[current] = x;
  pause();
  X result = buffer[current / 32 * 32];
  for (int i = 1; i < 32; i++) result = join(result, buffer[current / 32 * 32 + i]);
  pause();
  return result;
}
DEVICE float wave_sum(float x) { return of_wave(floats, x, [](float a, float b) { return a + b; }); }
DEVICE float wave_max(float x) { return of_wave(floats, x, [](float a, float b) { return a > b ? a : b; }); }
DEVICE int wave_min(int x) { return of_wave(ints, x, [](int a, int b) { return a < b ? a : b; }); }
DEVICE float exponential(float x) { return expf(x); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
DEVICE float inverse_root(float x) { return 1 / sqrtf(x); }
DEVICE float cosine(float x) { return cosf(x); }
DEVICE float sine(float x) { return sinf(x); }
"""

RUN = r"""
extern "C" void run(int groups, int group_threads, void** pointers, long* sizes, int** shapes) {
  threads = group_threads;
  for (int group = 0; group < groups; group++) {
    finished = 0;
    arguments = {pointers, sizes, shapes, group};
    while (finished < threads) {
      int before = finished;
      for (current = 0; current < threads; current++) {
        if (_setjmp(scheduler)) continue;
        if (current < started) _longjmp(fibers[current], 1);
        started++;
        getcontext(&start);
        start.uc_stack.ss_sp = stacks[current];
        start.uc_stack.ss_size = sizeof stacks[current];
        start.uc_link = NULL;
        makecontext(&start, enter, 0);
        swapcontext(&first, &start);
      }
      if (finished != before && finished != threads) { fprintf(stderr, "a barrier not all reached\n"); abort(); }
    }
  }
}
"""

NAMES = {mx.float32: "float32", mx.bfloat16: "bfloat16", mx.float16: "float16", mx.int32: "int", mx.uint32: "uint32_t"}


@cache
def _library(source: str) -> ctypes.CDLL:
    folder = Path(tempfile.gettempdir()) / "mlx-dgemma-emulator"
    folder.mkdir(exist_ok=True)
    made = folder / f"{hashlib.sha256(source.encode()).hexdigest()[:24]}.so"
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=folder) as own:
            code, built = Path(own, "kernel.cpp"), Path(own, "kernel.so")
            code.write_text(source)
            command = ["g++", "-std=c++17", "-O0", "-shared", "-fPIC", "-w", str(code), "-o", str(built)]
            subprocess.run(command, check=True)
            built.replace(made)
    return ctypes.CDLL(str(made))


def _source(name, inputs, outputs, integers, constants):
    """The C++ of a kernel: one function for a thread, and `run`."""
    arrays = [*inputs.items(), *outputs.items()]
    lines = [PRELUDE]
    lines += [f"#define {key} ({value!r}f)" for key, value in constants.items()]
    lines += ["static struct { void** pointers; long* sizes; int** shapes; int group; } arguments;"]
    lines += ["static void body() {", "  int group = arguments.group, tid = current, lane = tid % 32, wave = tid / 32;"]
    for key, value in integers.items():
        given = (
            f"  using {key} = {NAMES[value]};"
            if isinstance(value, mx.Dtype)
            else f"  constexpr int {key} = {int(value)};"
        )
        lines.append(given)
    for i, (key, array) in enumerate(arrays):
        kind = NAMES[array.dtype if isinstance(array, mx.array) else array[1]]
        const = "const " if key in inputs else ""
        lines.append(f"  Array<{const}{kind}> {key}{{({const}{kind}*)arguments.pointers[{i}], arguments.sizes[{i}]}};")
        lines.append(f"  const int* {key}_shape = arguments.shapes[{i}];")
    lines += [getattr(sources, name), "}"]
    lines += [
        "static void enter() { for (; true; finished++, pause()) body(); }",
        RUN,
    ]
    return "\n".join(lines)


def launch(name, inputs, outputs, groups, threads, integers, **constants):
    """As `launch._launch`, at once and on the CPU."""
    library = _library(_source(name, inputs, outputs, integers, constants))
    buffers, shapes = [], []
    for array in inputs.values():
        assert array.ndim, "a kernel on Metal takes an array without axes by reference"
        raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        buffers.append(np.ascontiguousarray(np.array(raw)))
        shapes.append(array.shape)
    for shape, dtype in outputs.values():
        raw = np.uint16 if dtype == mx.bfloat16 else np.array(mx.zeros((1,), dtype)).dtype
        buffers.append(np.full(shape, 123, raw))  # what a kernel leaves out is seen
        shapes.append(shape)
    count = len(buffers)
    library.run(
        groups,
        threads,
        (ctypes.c_void_p * count)(*(one.ctypes.data for one in buffers)),
        (ctypes.c_long * count)(*(one.size for one in buffers)),
        (ctypes.POINTER(ctypes.c_int) * count)(*((ctypes.c_int * max(len(one), 1))(*one) for one in shapes)),
    )
    found = []
    for buffer, (_, dtype) in zip(buffers[len(inputs) :], outputs.values()):
        found.append(mx.array(buffer).view(mx.bfloat16) if dtype == mx.bfloat16 else mx.array(buffer))
    return found
