"""What a primitive needs of Metal: kernels of the wheel's table, or a rule of MLX's sources where there is no table.

The rules are those of mlx/backend/metal of MLX. `missing` says what of a recorded primitive Metal lacks.
"""

import sys
from functools import lru_cache
from pathlib import Path

from metal_recorder import MODES, Record

sys.path.append(str(Path(__file__).parent.parent / "bench"))
import metal_kernels

# backend/gpu/primitives.cpp: another view of the input's buffer, or a copy of it.
VIEWS = frozenset(
    """AsStrided Broadcast BroadcastAxes Copy CustomTransforms Depends ExpandDims Flatten NumberOfElements Reshape Slice
    Split Squeeze StopGradient Transpose Unflatten View""".split()
)
COPIES = frozenset("Concatenate Contiguous Full Pad DynamicSlice DynamicSliceUpdate".split())
# Kernels of these are named by the dtypes of input and output: unary_ops of backend/metal/unary.cpp.
UNARY = frozenset(
    """Abs ArcCos ArcCosh ArcSin ArcSinh ArcTan ArcTanh BitwiseInvert Ceil Conjugate Cos Cosh Erf ErfInv Exp Expm1
    Floor FromFP8 Imag Log Log10 Log1p Log2 LogicalNot Negative Real Round Rsqrt Sigmoid Sign Sin Sinh Sqrt Square
    Tan Tanh ToFP8""".split()
)
# By the dtype of the first input: backend/metal/binary.cpp.
BINARY = frozenset(
    """Add ArcTan2 BitwiseAnd BitwiseOr BitwiseXor DivMod Divide Equal FloorDivide Greater GreaterEqual LeftShift Less
    LessEqual LogAddExp LogicalAnd LogicalOr Maximum Minimum Multiply NaNEqual NotEqual Power Remainder RightShift
    Subtract""".split()
)
# Compiled from source when they first run: backend/metal/indexing.cpp, compiled.cpp, custom_kernel.cpp.
COMPILED_AT_RUN_TIME = {
    "Gather": "any dtype that Metal's language has; at most 20 index arrays",
    "GatherAxis": "any dtype that Metal's language has",
    "Scatter": "no dtype of 8 bytes, but complex64 sums: its atomics have 4",
    "ScatterAxis": "no dtype of 8 bytes, but complex64 sums: its atomics have 4",
    "MaskedScatter": "any dtype that Metal's language has",
    "Compiled": "the rules of its elementwise primitives",
    "CustomKernel": "what its source says",
}
# primitives.cpp: eval_gpu throws "NYI".
ON_THE_CPU_ONLY = frozenset("QRF SVD Inverse Cholesky Eig Eigh LUF".split())
BITWISE = ("BitwiseAnd", "BitwiseOr", "BitwiseXor", "LeftShift", "RightShift")
REDUCTIONS = ("and", "or", "sum", "prod", "min", "max")
SCANS = ("max", "min", "sum", "prod", "logaddexp")
SUM = "2"
BYTES = {"bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "float16": 2, "bfloat16": 2, "float64": 8}
BYTES |= {"uint32": 4, "int32": 4, "float32": 4, "uint64": 8, "int64": 8, "complex64": 8}


def missing(record: Record, version: str) -> str | None:
    """What Metal lacks for a primitive, in every wheel of a version of MLX; None where it lacks nothing."""
    for dtype, _ in (*record.inputs, *record.outputs):
        if dtype == "float64":
            return "Metal has no float64 (array.cpp)"
    try:
        needed = needs(record)
    except LookupError as error:
        return str(error.args[0])
    for table in tables(version):
        for operation, dtypes in needed:
            if operation not in table:
                return f"no kernel of '{operation}'"
            if dtypes not in table[operation]["dtypes"]:
                return f"no kernel of '{operation}' for {dtypes}"
    return None


@lru_cache
def tables(version: str) -> list[dict]:
    """The stored tables of a version, one for each group of wheels that are alike."""
    found = [entry["operations"] for entry in metal_kernels.load() if entry["mlx"] == version]
    assert found, f"no table of mlx {version}: run python bench/metal_kernels.py"
    return found


def needs(record: Record) -> list[tuple[str, str]]:
    """(operation, dtypes) of the table that Metal takes for a primitive.

    Raises:
        LookupError: there is none, and why.
    """
    name, state = record.name, record.state
    into = [dtype for dtype, _ in record.inputs]
    out = [dtype for dtype, _ in record.outputs]
    if name in ON_THE_CPU_ONLY:
        raise LookupError(f"{name} has no implementation for GPUs (primitives.cpp)")
    if name in ("Scatter", "ScatterAxis") and BYTES[out[0]] == 8 and (out[0], state[0]) != ("complex64", SUM):
        raise LookupError(f"{name} does not support {out[0]} (indexing.cpp)")
    if name in COMPILED_AT_RUN_TIME:
        return []
    if name in VIEWS:
        return [("copy copy", f"{dtype} {dtype}") for dtype in out]
    if name in COPIES or name == "SliceUpdate":
        return [("copy copy", f"{out[0]} {out[0]}"), ("strided copy copy", f"{out[0]} {out[0]}")]
    if name == "AsType":
        return [("copy copy", f"{into[0]} {out[0]}")]
    if name == "Arange":
        return [("arange arange", out[0])]
    if name == "RandomBits":
        return [("random rbits", "")]
    if name == "Select":
        return [("elementwise Select", out[0])]
    if name in ("Log", "Sqrt", "BitwiseBinary", "Equal"):
        name = {
            "Log": ("Log2", "Log10", "Log")[int(state[0])] if name == "Log" else "",
            "Sqrt": "Rsqrt" if state == ("True",) else "Sqrt",
            "BitwiseBinary": BITWISE[int(state[0])] if name == "BitwiseBinary" else "",
            "Equal": "NaNEqual" if state == ("True",) else "Equal",
        }[name]
    if name in UNARY:
        return [(f"elementwise {name}", f"{into[0]} {out[0]}")]
    if name in BINARY:
        return [(f"elementwise {name}", into[0])]
    return _reductions(name, state, into, out) or _products(name, state, into, out)


def _reductions(name: str, state: tuple, into: list[str], out: list[str]) -> list[tuple[str, str]]:
    if name == "Reduce":
        kind = REDUCTIONS[int(state[0])]
        read, written = reduced_as(into[0], kind)
        return [(f"reduce {kind}", read), (f"init reduce {kind}", written)]
    if name == "ArgReduce":
        return [("arg reduce " + ("argmin", "argmax")[int(state[0])], into[0])]
    if name in ("Scan", "CumLogAddExp"):
        kind = SCANS[int(state[0])] if state else "logaddexp"
        return [(f"scan {kind}", f"{into[0]} {out[0]}")]
    if name in ("ArgSort", "ArgPartition"):  # a partition is a sort: backend/metal/sort.cpp
        return [("sort arg_block_sort", f"{into[0]} uint32"), ("sort mbsort", f"{into[0]} uint32")]
    if name in ("Sort", "Partition"):
        return [("sort block_sort", f"{into[0]} {into[0]}"), ("sort mbsort", f"{into[0]} uint32")]
    if name == "Softmax":
        precise = state[:1] == ("True",) and into[0] != "float32"
        return [("softmax softmax_precise" if precise else "softmax softmax", into[0])]
    if name == "LogSumExp":
        return [("softmax logsumexp", into[0])]
    if name == "SearchSorted":
        return [("search searchsorted", into[0])]
    return []


def _products(name: str, state: tuple, into: list[str], out: list[str]) -> list[tuple[str, str]]:
    if name in ("Matmul", "AddMM"):
        return [("product fused", f"{into[0]} {out[0]}"), ("product gemv", into[0])]
    if name == "GatherMM":
        return [("gathered product gather_mm", f"{into[0]} {out[0]}")]
    if name in ("QuantizedMatmul", "GatherQMM", "Quantize"):
        group, bits, mode = (int(one) for one in state[:3])
        return [(f"quantized {MODES[mode]} group {group} bits {bits}", into[0])]
    if name in ("RMSNorm", "RMSNormVJP", "LayerNorm", "LayerNormVJP"):
        kernel = {"RMSNorm": "rms", "LayerNorm": "layer_norm"}[name.removesuffix("VJP")]
        return [(f"norm {'vjp_' if name.endswith('VJP') else ''}{kernel}", out[0])]
    if name == "RoPE":
        return [("rope rope", into[0])]
    if name == "ScaledDotProductAttention":
        dim, vector = int(state[0]), state[1] == "True"
        if vector:
            return [(f"vector attention {dim}", into[0])]
        if dim == 512:
            return [("blocked attention causal_mask", into[0]), ("blocked attention scale_copy", into[0])]
        return [(f"attention bd{dim}", into[0])]
    raise LookupError(f"no rule of tests/metal_rules.py knows the primitive {name}")


def reduced_as(dtype: str, kind: str) -> tuple[str, str]:
    """`remap_reduce_types` of backend/metal/reduce.cpp: the dtypes that a reduction reads and writes."""
    if kind in ("sum", "prod"):
        if dtype == "bool":
            return "int8", "int32"
        small = {"int8": "int32", "int16": "int32", "uint8": "uint32", "uint16": "uint32"}
        return dtype, small.get(dtype, dtype)
    if kind in ("and", "or"):
        as_float = dtype if dtype in ("float16", "bfloat16", "float32") else None
        return as_float or {1: "bool", 2: "int16", 4: "int32", 8: "int64"}[BYTES[dtype]], "bool"
    return dtype, dtype
