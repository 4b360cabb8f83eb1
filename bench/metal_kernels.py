"""What MLX's Metal backend has, read from the names of the kernels in the macOS wheels of `mlx-metal`.

    python bench/metal_kernels.py             # write tests/data/metal_kernels.json anew
    python bench/metal_kernels.py --check     # read the installed version's wheels again and compare

The wheels are downloaded by pip and need no Mac. A kernel's name tells its operation, its variant (the layout of its
input, a tile size) and its dtypes. The table has one line for each operation: the dtypes for which every variant
exists. Kernels that MLX compiles from source at run time have no name in the wheel and are not in the table;
tests/metal_rules.py knows the rules for them.

Exit code 1: the table differs from the wheels. Exit code 3: a wheel could not be had.
"""

import argparse
import io
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

TABLE = Path(__file__).parent.parent / "tests" / "data" / "metal_kernels.json"
PLATFORMS = ("macosx_14_0_arm64", "macosx_15_0_arm64", "macosx_26_0_arm64")
NO_WHEEL = 3
DTYPES = {
    "bool_": "bool", "bool": "bool", "uint8": "uint8", "uint16": "uint16", "uint32": "uint32", "uint64": "uint64",
    "int8": "int8", "int16": "int16", "int32": "int32", "int64": "int64", "bfloat16_t": "bfloat16",
    "bfloat16": "bfloat16", "float16_t": "float16", "float16": "float16", "float32": "float32", "float": "float32",
    "complex64_t": "complex64", "complex64": "complex64",
}  # fmt: skip
DTYPE = "(?:" + "|".join(sorted(DTYPES, key=len, reverse=True)) + ")"
WIDE = {"int64", "uint64", "complex64"}  # one thread does one element of eight bytes: no variants for several


class Family:
    """Kernels of one pattern: its group `op` names the operation, `t` holds dtypes, the others are variants."""

    def __init__(self, name: str, pattern: str):
        self.name, self.pattern = name, re.compile(pattern.replace("DTYPES", f"(?P<t>(?:_?{DTYPE})+?)"))

    def __repr__(self) -> str:
        return self.name


QUANTIZED = r"(?P<op>affine|mxfp4|mxfp8|nvfp4)_(?P<v1>\w+?)_DTYPES_gs_(?P<gs>\d+)_b_(?P<b>\d+)(?P<v2>\w*)"
FAMILIES = [
    Family("sort", r"(?:n?c)_(?P<op>block_sort)_DTYPES_bn\d+_tn\d+"),
    Family("sort", r"(?:n?c)(?P<op>arg_block_sort)_DTYPES_bn\d+_tn\d+"),
    Family("sort", r"(?P<v1>sort|partition|merge)_(?P<op>mbsort)_DTYPES_bn\d+_tn\d+"),
    Family("scan", r"(?P<v1>(?:contig|strided)_scan(?:_reverse)?_\w+?)_(?P<op>sum|prod|max|min|logaddexp)_DTYPES"),
    Family("init reduce", r"init_reduce_(?P<op>and|or|sum|prod|max|min)DTYPES"),
    Family("reduce", r"(?P<v1>all|row|col)_reduce_(?P<v2>\w*?)(?:reduce_)?(?P<op>and|or|sum|prod|max|min)DTYPES"),
    Family("arg reduce", r"(?P<op>argmax|argmin)_DTYPES"),
    Family("softmax", r"(?P<v1>block|looped)_(?P<op>softmax_precise|softmax|logsumexp)_DTYPES"),
    Family("arange", r"(?P<op>arange)DTYPES"),
    Family("search", r"(?P<op>searchsorted)_DTYPES(?P<v1>\w+)"),
    Family("norm", r"(?P<op>(?:vjp_)?(?:rms|layer_norm))(?P<v1>_looped)?DTYPES"),
    Family("rope", r"(?P<op>rope)_(?P<v1>(?:single_)?(?:freqs_)?(?:large_)?)DTYPES"),
    Family("attention", r"steel_attention_DTYPES_bq\d+_bk\d+_(?P<op>bd\d+)_bv\d+_wm\d+_wn\d+_mask(?P<v1>bool_)?\w*"),
    Family("vector attention", r"sdpa_vector_DTYPES_(?P<op>\d+)_(?P<v1>\d+)"),
    Family("blocked attention", r"sdpa_blocked_(?P<op>causal_mask|scale_copy)_DTYPES"),
    Family("product", r"steel_gemm_(?P<op>fused|splitk)_(?P<v1>[nt][nt])_DTYPES(?P<v2>_bm\w+)"),
    Family("product", r"(?P<op>gemv)_(?P<v1>(?:t_)?)DTYPES(?P<v2>_bm\w+)"),
    Family("gathered product", r"steel_(?P<op>gather_mm)_(?P<v1>(?:rhs_)?[nt][nt])_DTYPES(?P<v2>_bm\w+)"),
    Family("quantized", QUANTIZED),
    Family("random", r"(?P<op>rbits)c?"),
    Family("strided copy", r"(?P<v1>ggn?\d?(?:large)?)_(?P<op>(?:dynamic_)?copy)DTYPES"),
    Family("copy", r"(?P<v1>gn?\d(?:large)?|[sv]n?2?)_(?P<op>copy)DTYPES"),
    Family("elementwise", r"(?P<v1>(?:g|gn)\d(?:large)?|[sv]{1,2}[n2]?)_(?P<op>[A-Z]\w*?)DTYPES"),
]  # fmt: skip


def kernels(library: bytes) -> set[str]:
    """Names of the functions in a metallib: each stands behind the tag NAME and its length."""
    return {match[1].decode() for match in re.finditer(rb"NAME..([A-Za-z_]\w*)\0", library, re.DOTALL)}


def parse(name: str) -> tuple[str, str, str] | None:
    """(operation, variant, dtypes) of a kernel, or None where no family knows it."""
    for family in FAMILIES:
        if match := family.pattern.fullmatch(name):
            parts = match.groupdict()
            dtypes = [DTYPES[one] for one in re.findall(DTYPE, parts.pop("t", None) or "")]
            operation = f"{family} {parts.pop('op')}"
            if family.name == "quantized":
                operation += f" group {parts.pop('gs')} bits {parts.pop('b')}"
                if re.search(r"_hgs(?!_\d)", parts["v2"]):
                    operation += " with a global scale"
            return operation, " ".join(part for part in parts.values() if part), " ".join(dtypes)
    return None


def exempt(operation: str, variant: str, dtypes: str) -> bool:
    """Whether these dtypes need no such variant: n counts elements of a thread, which is one for wide types."""
    return operation.startswith(("elementwise", "copy")) and variant.endswith("n") and bool(WIDE & set(dtypes.split()))


def summary(names: set[str]) -> dict[str, dict]:
    """The dtypes of each operation, by whether every variant of it exists for them."""
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if parsed := parse(name):
            operation, variant, dtypes = parsed
            found[operation][dtypes].add(variant)
    table: dict[str, dict] = {}
    for operation, by_dtypes in sorted(found.items()):
        variants = set().union(*by_dtypes.values())
        lacking = {
            dtypes: sorted(v for v in variants - have if not exempt(operation, v, dtypes))
            for dtypes, have in sorted(by_dtypes.items())
        }
        table[operation] = {"dtypes": [dtypes for dtypes, some in lacking.items() if not some]}
        if partly := {dtypes: len(some) for dtypes, some in lacking.items() if some}:
            table[operation]["some variants lack"] = partly
    return table


def compact(table: dict[str, dict]) -> list[dict]:
    """The same with one entry for all operations that have the same dtypes."""
    groups: dict[str, dict] = {}
    for operation, entry in table.items():
        group = groups.setdefault(json.dumps(entry), {**entry, "dtypes": ", ".join(entry["dtypes"]), "operations": []})
        group["operations"].append(operation)
    return [{**group, "operations": ", ".join(group["operations"])} for group in groups.values()]


def expand(groups: list[dict]) -> dict[str, dict]:
    """What `compact` was given."""
    table = {}
    for group in groups:
        operations, entry = group.pop("operations").split(", "), dict(group)
        entry["dtypes"] = entry["dtypes"].split(", ") if entry["dtypes"] else [""]
        table.update(dict.fromkeys(operations, entry))
    return dict(sorted(table.items()))


def allowed_versions() -> list[str]:
    """Versions of mlx-metal that pyproject.toml allows and the registry has."""
    (bound,) = (one for one in metadata.requires("mlx-dgemma") or [] if re.match(r"mlx\s*>=", one))
    # A version that does not exist: pip's answer lists those that do.
    said = pip_download("0", Path(tempfile.gettempdir()), PLATFORMS[0]).stderr
    listed = re.search(r"from versions: ([^)]*)\)", said)
    least = numbers(bound.partition(">=")[2])
    return [
        one
        for one in (listed[1].split(", ") if listed else [])
        if re.fullmatch(r"[\d.]+", one) and numbers(one) >= least
    ]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def pip_download(version: str, folder: Path, platform: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--platform", platform]
    return subprocess.run(
        [*command, "--dest", str(folder), f"mlx-metal=={version}"], capture_output=True, text=True, check=False
    )


def libraries(version: str) -> Iterator[tuple[str, bytes]]:
    """(platform, metallib) of each wheel of a version."""
    for platform in PLATFORMS:
        with tempfile.TemporaryDirectory() as folder:
            said = pip_download(version, Path(folder), platform)
            if said.returncode:
                print(f"skipped: pip has no wheel of mlx-metal {version} for {platform} here")
                sys.exit(NO_WHEEL)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as files:
                (name,) = (one for one in files.namelist() if one.endswith("/mlx.metallib"))
                yield platform, files.read(name)


def read(version: str) -> list[dict]:
    """The tables of a version; platforms whose tables are equal share one."""
    entries: list[dict] = []
    for platform, library in libraries(version):
        names = kernels(library)
        table, known = summary(names), sum(parse(name) is not None for name in names)
        same = next((one for one in entries if one["operations"] == table), None)
        if same is None:
            same = {"mlx": version, "wheels": {}, "operations": table}
            entries.append(same)
        same["wheels"][platform] = {"kernels": len(names), "in this table": known}
    return entries


def load() -> list[dict]:
    """The stored tables as `read` makes them."""
    return [{**entry, "operations": expand(entry["operations"])} for entry in json.loads(TABLE.read_text())]


def store(entries: list[dict]) -> None:
    entries = [{**one, "operations": compact(one["operations"])} for one in entries]
    TABLE.write_text(json.dumps(entries, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    args = parser.parse_args()
    installed = metadata.version("mlx")
    if not args.check:
        versions = allowed_versions()
        store([entry for version in versions for entry in read(version)])
        print(f"{TABLE.name}: mlx-metal {', '.join(versions)}")
        return
    stored, made = [one for one in load() if one["mlx"] == installed], read(installed)
    if stored != made:
        print(f"{TABLE.name} differs from the wheels of mlx-metal {installed}: run python bench/metal_kernels.py")
        sys.exit(1)
    print(f"{TABLE.name} is what the wheels of mlx-metal {installed} hold")


if __name__ == "__main__":
    main()
