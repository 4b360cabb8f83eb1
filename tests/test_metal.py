"""The Metal gate: every primitive that the package asks of MLX exists in its Metal backend, for its dtypes.

No Mac is needed. `metal_paths.py` walks the package's paths, `metal_recorder.py` records their primitives with the
branches that a Mac takes, `metal_rules.py` holds them against the kernels of MLX's macOS wheels.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import metal_paths
import mlx.core as mx
import numpy as np
import pytest
from metal_recorder import NOT_OPERATIONS, PACKAGE, TRANSFORMS, Recorder, primitives
from metal_rules import metal_kernels, missing, tables

VERSION = mx.__version__
DTYPES = ("float32", "bfloat16", "float16")
pytestmark = pytest.mark.skipif(mx.default_device() != mx.cpu, reason="recorded on MLX's CPU backend")


@lru_cache
def recorder_of(name: str, dtype: str) -> Recorder:
    recorder = Recorder()
    with TemporaryDirectory() as folder:
        metal_paths.write_toy(Path(folder) / "toy")
        with recorder.recording():
            metal_paths.run(name, dtype, Path(folder))
    return recorder


def lacks(recorder: Recorder) -> list[str]:
    found = ((record, missing(record, VERSION)) for record in recorder.records.values())
    return [f"{record}: {what}" for record, what in found if what]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", metal_paths.PATHS)
def test_metal_has_what_a_path_asks_for(name, dtype):
    recorder = recorder_of(name, dtype)
    assert lacks(recorder) == recorder.untraced == []
    if name not in ("custom_kernels", "conversions"):
        assert {"Matmul", "Softmax", "RMSNorm", "RoPE", "GatherMM"} & {one.name for one in recorder.records.values()}
        assert any(dtype in str(one) for one in recorder.records.values())


# Functions of the package whose operations no Mac asks for.
NOT_ON_A_MAC = {
    "suit_device": "on the CPU, weights by columns",
    "geglu": "on the CPU, without powers",
    "_matmul_slice": "on the CPU, by columns",
    "_in_padded_runs": "on CUDA",
    "_assign_slots": "on CUDA",
    "slot_contents": "on CUDA",
    "gather_matrices": "on CUDA",
}
# Copies, which Metal has for every dtype, of what no path holds: parts of an older layout, features of pictures.
ONLY_COPIED = {
    ("_arrays", "mx.concatenate"),
    ("_load_slices", "mx.concatenate"),
    ("image_features", "mx.concatenate"),
    ("image_features", "mx.stop_gradient"),
    ("loss", "mx.concatenate"),
}


def test_every_operation_of_the_package_is_on_a_path():
    recorders = [recorder_of(name, dtype) for name in metal_paths.PATHS for dtype in DTYPES]
    places = {place.rpartition(":") for recorder in recorders for place in recorder.places}
    seen = {(file, int(line)) for file, _, line in places}
    unseen = []
    for file in sorted(PACKAGE.rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if file.parent.name == "check":  # asks on purpose for what a device may lack
            continue
        for function, node in calls(ast.parse(file.read_text())):
            if is_operation(node) and function not in NOT_ON_A_MAC:
                if (function, ast.unparse(node.func)) in ONLY_COPIED:
                    continue
                lines = {(name, line) for line in range(node.lineno, node.end_lineno + 1)}
                if not lines & seen:
                    unseen.append(f"{name}:{node.lineno} in {function}: {ast.unparse(node.func)}")
    assert not unseen, "\n".join(unseen)


def calls(tree: ast.AST, function: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All nodes with the name of the function that they are in."""
    for node in ast.iter_child_nodes(tree):
        inside = node.name if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        yield inside, node
        yield from calls(node, inside)


def is_operation(node: ast.AST) -> bool:
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
        return False
    owner, name = ast.unparse(node.func.value), node.func.attr
    if owner not in ("mx", "mx.fast", "mx.random", "mx.linalg") or name in TRANSFORMS:
        return False
    module = {"mx": mx, "mx.fast": mx.fast, "mx.random": mx.random, "mx.linalg": mx.linalg}[owner]
    return name not in (*NOT_OPERATIONS, "key") and type(getattr(module, name, None)).__name__ == "nb_func"


# Pairs of an operation and a dtype that Metal lacks. The CPU and CUDA have most of them.
FLAGS, INTS, FLOATS = mx.array([True, False, True]), mx.array([3, 1, 2]), mx.array([0.5, 2.0, 1.0])
MATRIX, LONG, COMPLEX = mx.eye(3), INTS.astype(mx.int64), FLOATS.astype(mx.complex64)
WIDE = mx.zeros((4, 512))
PLANTED: dict[str, tuple[Callable[[], object], str]] = {
    "the bool sort of the head": (lambda: mx.argsort(~FLAGS)[:2], "ArgSort of bool"),
    "sort of bool": (lambda: mx.sort(FLAGS), "Sort of bool"),
    "argpartition of bool": (lambda: mx.argpartition(FLAGS, kth=1), "ArgPartition of bool"),
    "topk of bool": (lambda: mx.topk(FLAGS, 2), "Partition of bool"),
    "maximum of a bool array": (lambda: FLAGS.max(), "Reduce of bool"),
    "cast to float64": (lambda: FLOATS.astype(mx.float64), "AsType of float32"),
    "float64 of numpy": (lambda: mx.exp(mx.array(np.ones(3), mx.float64)), "Exp of float64"),
    "scatter of int64": (lambda: LONG.at[mx.array([0])].add(1), "Scatter of int64"),
    "put_along_axis of int64": (
        lambda: mx.put_along_axis(LONG, INTS - 1, LONG, axis=0), "ScatterAxis of int64",
    ),
    "argmax of complex64": (lambda: mx.argmax(COMPLEX), "ArgReduce of complex64"),
    "quantization in groups of 256": (lambda: mx.quantize(WIDE, group_size=256, bits=4), "Quantize of float32"),
    "quantization to 7 bits": (lambda: mx.quantize(WIDE, group_size=64, bits=7), "Quantize of float32"),
    "mxfp4 in groups of 64": (lambda: mx.quantize(WIDE, 64, 4, mode="mxfp4"), "Quantize of float32"),
    "inverse": (lambda: mx.linalg.inv(MATRIX), "Inverse of float32"),
    "singular values": (lambda: mx.linalg.svd(MATRIX), "SVD of float32"),
    "a primitive without a rule": (lambda: mx.conv1d(WIDE[None], WIDE[:, None]), "Convolution of float32"),
}  # fmt: skip
HAD = {
    "sort of int8": lambda: mx.sort(INTS.astype(mx.int8)),
    "cumulative sum of int64": lambda: mx.cumsum(LONG),
    "argmax of bool": lambda: mx.argmax(FLAGS),
    "any of int64": lambda: mx.any(LONG),
    "sum of bool": lambda: FLAGS.sum(),
    "inverse on the CPU's stream": lambda: mx.linalg.inv(MATRIX, stream=mx.cpu),
    "int64 numbers of numpy": lambda: mx.array(np.arange(3)) + 1,
    "scatter of int32": lambda: INTS.at[mx.array([0])].add(1),
    "affine in groups of 32": lambda: mx.quantize(WIDE, group_size=32, bits=5),
    "mxfp8": lambda: mx.quantize(WIDE, mode="mxfp8"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_pair_is_named_with_its_place(name):
    planted, expected = PLANTED[name]
    recorder = Recorder()
    with recorder.recording(), suppress(ValueError, RuntimeError):
        planted()
    found = lacks(recorder)
    line = planted.__code__.co_firstlineno
    assert any(one.startswith(expected) and f"at test_metal.py:{line} " in one for one in found), found


@pytest.mark.parametrize("name", HAD)
def test_a_pair_that_metal_has_passes(name):
    recorder = Recorder()
    with recorder.recording():
        HAD[name]()
    assert lacks(recorder) == []


def test_the_gate_sees_gradients_and_mapped_functions():
    recorder = Recorder()
    with recorder.recording():
        mx.value_and_grad(lambda x: (x * x).sum())(FLOATS)
        mx.vmap(lambda x: mx.sort(x))(FLAGS[None])
    assert any("mx.value_and_grad" in str(one) for one in recorder.records.values())
    assert next(one for one in lacks(recorder) if "mx.vmap" in one).startswith("Sort of bool at test_metal.py")


def test_attention_that_metal_cannot_fuse_is_refused():
    recorder, q = Recorder(), mx.zeros((1, 2, 16, 512))
    with recorder.recording(), pytest.raises(ValueError, match=r"head dimension 512 at test_metal.py:\d+$"):
        mx.fast.scaled_dot_product_attention(q, q, q, scale=1.0, force_fused=True)


def test_the_table_knows_the_installed_version():
    wheels = [platform for entry in metal_kernels.load() if entry["mlx"] == VERSION for platform in entry["wheels"]]
    assert sorted(wheels) == sorted(metal_kernels.PLATFORMS)
    for table in tables(VERSION):
        assert "bool uint32" not in table["sort arg_block_sort"]["dtypes"]
        assert "int64 int64" in table["scan sum"]["dtypes"]


@pytest.mark.parametrize(
    ("kernel", "parsed"),
    [
        ("carg_block_sort_int32_uint32_bn64_tn4", ("sort arg_block_sort", "", "int32 uint32")),
        ("vv_Addbfloat16", ("elementwise Add", "vv", "bfloat16")),
        ("v_Expm1float16float16", ("elementwise Expm1", "v", "float16 float16")),
        ("g2large_copyuint8bool_", ("copy copy", "g2large", "uint8 bool")),
        ("affine_qmm_n_float_gs_64_b_4_batch_0", ("quantized affine group 64 bits 4", "qmm_n _batch_0", "float32")),
        ("rmsfloat32", ("norm rms", "", "float32")),
        ("winograd_conv_2d_input_transform_float32_bc32", None),
    ],
)  # fmt: skip
def test_names_of_kernels_are_parsed(kernel, parsed):
    assert metal_kernels.parse(kernel) == parsed


def test_names_are_found_in_a_library():
    library = b"MTLBx\x00NAME\x0a\x00rmsfloat32\x00TYPE\x01\x00NAME\x0e\x00vv_Addbfloat16\x00TYPE"
    assert metal_kernels.kernels(library) == {"rmsfloat32", "vv_Addbfloat16"}


def test_launching_primitives_are_counted_without_being_computed():
    x, w = mx.zeros((2, 8), mx.bfloat16), mx.zeros((8,), mx.bfloat16)
    mx.eval(x, w)
    made = primitives.count_primitives(
        lambda: mx.fast.rms_norm(x, w, 1e-6).reshape(16)[2:].astype(mx.float32) @ mx.ones((14,))
    )
    assert made == {"RMSNorm": 1, "AsType": 1, "Full": 1, "Matmul": 1}
    fused = mx.compile(lambda a: mx.exp(a) * a + 1)
    assert list(primitives.count_primitives(fused, x).values()) == [1]
