"""The layers of the code: which room may import which, and how large a file, a function and a folder may be."""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

# A room imports the rooms before it and its own modules. Imports inside functions and for types count too.
ROOMS = (
    "errors",
    "files",
    "installation",
    "upstream",
    "constraints",
    "distributed",
    "model",
    "checkpoint",
    "decoding",
    "prompt",
    "convert",
    "adapters",
    "tasks",
    "engine",
    "serving",
    "ranks",
    "tune",
    "check",
    "server",
    "desktop",
    "cli",
    "plugins",
    "__init__",
    "__main__",
)
AT_THE_ROOT = {"__init__", "__main__", "engine", "errors", "files", "installation", "upstream"}
FILE_LINES, ENGINE_LINES, FUNCTION_LINES, FOLDER_MODULES = 450, 300, 70, 15
PACKAGE = "mlx_dgemma"
ROOT = Path(__file__).parent.parent


class Import(NamedTuple):
    """One imported name: `target` is the module that is read, `name` what is taken from it ("" for the module)."""

    importer: str
    target: str
    name: str
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}" + (f".{self.name}" if self.name else "")


class Facts(NamedTuple):
    """What the rules ask of a file; its tree itself would take too much memory to be kept."""

    imports: list[ast.Import | ast.ImportFrom]
    attributes: list[tuple[int, str, str]]  # line, name, attribute
    functions: list[tuple[int, str, int]]  # line, name, lines


@cache
def facts_of(text: str) -> Facts:
    found = Facts([], [], [])
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found.imports.append(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.attributes.append((node.lineno, node.value.id, node.attr))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found.functions.append((node.lineno, node.name, node.end_lineno - node.lineno + 1))
    return found


def modules_of(root: Path) -> dict[str, Path]:
    """The modules by their dotted names inside the package: convert/cli.py is `convert.cli`."""
    found = {}
    for folder, prefix in ((root / PACKAGE, ()), (root / "convert", ("convert",))):
        for file in sorted(folder.rglob("*.py")):
            parts = (*prefix, *file.relative_to(folder).with_suffix("").parts)
            if prefix or parts[0] != "convert":  # mlx_dgemma/convert would be convert/ once more
                found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = file
    return found


def imports_of(root: Path) -> list[Import]:
    """What the modules import from the package, wherever in the file the import stands.

    `__version__` is left out: `__init__` runs before every module of the package and holds it.
    """
    modules, found = modules_of(root), []

    def take(importer: str, target: str, names: list[str], line: int) -> None:
        for name in names:
            submodule = f"{target}.{name}" if target else name
            if submodule in modules:
                found.append(Import(importer, submodule, "", line))
            elif (target, name) != ("", "__version__"):
                found.append(Import(importer, target or "__init__", name, line))

    for importer, file in modules.items():
        package = importer.split(".") if file.name == "__init__.py" else importer.split(".")[:-1]
        package = [] if importer == "__init__" else package
        for node in facts_of(file.read_text()).imports:
            if isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                parts = [*base, *(node.module.split(".") if node.module else [])]
                if node.level == 0:
                    if parts[0] != PACKAGE:
                        continue
                    parts = parts[1:]
                take(importer, ".".join(parts), [alias.name for alias in node.names], node.lineno)
            else:
                for alias in node.names:
                    top, _, rest = alias.name.partition(".")
                    if top == PACKAGE:
                        found.append(Import(importer, rest or "__init__", "", node.lineno))
    return found


def room_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def height_of(module: str) -> int:
    room = room_of(module)
    return ROOMS.index(room) if room in ROOMS else -1


def upward_imports(root: Path) -> list[str]:
    """Imports from a room to a higher one."""
    return [str(one) for one in imports_of(root) if height_of(one.importer) < height_of(one.target)]


def private_imports(root: Path) -> list[str]:
    """Imports of another room's `_private` modules and names, and uses of them through an imported module."""
    imports = imports_of(root)
    found = [
        str(one)
        for one in imports
        if room_of(one.importer) != room_of(one.target)
        and any(is_private(part) for part in (*one.target.split("."), one.name))
    ]
    for importer, file in modules_of(root).items():
        foreign = {
            one.target.split(".")[-1]
            for one in imports
            if one.importer == importer and not one.name and room_of(one.target) != room_of(importer)
        }
        found += [
            f"{importer}:{line} uses {name}.{attribute}"
            for line, name, attribute in facts_of(file.read_text()).attributes
            if name in foreign and is_private(attribute)
        ]
    return found


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def circle(root: Path) -> list[str]:
    """A circle of imports among the modules, or nothing."""
    graph = {module: set() for module in modules_of(root)}
    for one in imports_of(root):
        if one.target != one.importer:
            graph[one.importer].add(one.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def sources(root: Path) -> Iterator[Path]:
    """The files with a budget of lines."""
    for folder in (PACKAGE, "convert", "tests", "bench"):
        for file in sorted((root / folder).rglob("*.py")):
            if (root / "bench" / "tasks") not in file.parents and (root / PACKAGE / "convert") not in file.parents:
                yield file


def long_files(root: Path) -> list[str]:
    found = []
    for file in sources(root):
        lines = len(file.read_text().splitlines())
        if lines > (ENGINE_LINES if file == root / PACKAGE / "engine.py" else FILE_LINES):
            found.append(f"{file.relative_to(root)} has {lines} lines")
    return found


def long_functions(root: Path) -> list[str]:
    return [
        f"{file.relative_to(root)}:{line} {name} has {lines} lines"
        for file in sources(root)
        for line, name, lines in facts_of(file.read_text()).functions
        if lines > FUNCTION_LINES
    ]


def misplaced_modules(root: Path) -> list[str]:
    """Modules at the root of the package or in rooms that `ROOMS` does not name, and crowded folders."""
    found, folders = [], {}
    for module, file in modules_of(root).items():
        if file.parent == root / PACKAGE and module not in AT_THE_ROOT:
            found.append(f"{module} stands at the root of the package")
        elif room_of(module) not in ROOMS:
            found.append(f"{module} is in a room without a place among the layers")
        if file.name not in ("__init__.py", "__main__.py"):
            folders.setdefault(file.parent.relative_to(root), []).append(file)
    found += [f"{name} has {len(files)} modules" for name, files in folders.items() if len(files) > FOLDER_MODULES]
    return found


CHECKS = (misplaced_modules, upward_imports, private_imports, circle, long_files, long_functions)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_code_keeps_the_rules(check):
    found = check(ROOT)
    assert not found, "\n".join(found)


def test_the_rules_look_at_the_whole_code():
    modules = modules_of(ROOT)
    assert {room_of(module) for module in modules} == set(ROOMS)
    assert modules["convert.cli"] == ROOT / "convert" / "cli.py"
    imports = imports_of(ROOT)
    assert any(one.importer == "convert.cli" and one.target == "errors" for one in imports)
    assert any(one.importer == "__init__" and one.target == "engine" and one.name == "load" for one in imports)
    assert Path(__file__) in set(sources(ROOT)) and ROOT / "bench" / "quality.py" in set(sources(ROOT))


# Each rule is shown to catch what it is for, on small trees.

GOOD = {
    "mlx_dgemma/__init__.py": "__version__ = '1'\nfrom .engine import load\n",
    "mlx_dgemma/__main__.py": "from .cli.main import main\n",
    "mlx_dgemma/engine.py": "from .model import layers\n\n\ndef load():\n    return layers\n",
    "mlx_dgemma/errors.py": "",
    "mlx_dgemma/model/__init__.py": "",
    "mlx_dgemma/model/layers.py": "from ..errors import one\nfrom .masks import two\nfrom ._parts import _three\n",
    "mlx_dgemma/model/masks.py": "import math\nfrom .. import __version__, errors\n",
    "mlx_dgemma/model/_parts.py": "",
    "mlx_dgemma/cli/main.py": "def main():\n    import mlx_dgemma.engine\n    from mlx_dgemma import convert\n",
    "convert/__init__.py": "from mlx_dgemma import __version__\nfrom mlx_dgemma.model.layers import part\n",
}


def tree(folder: Path, files: dict[str, str]) -> Path:
    """A small repository: the good one, with these files in place of its own."""
    for name, text in {**GOOD, **files}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_tree_that_keeps_the_rules_passes(check, tmp_path):
    assert check(tree(tmp_path, {})) == []


@pytest.mark.parametrize(
    "text",
    [
        "from ..engine import load\n",
        "from .. import engine\n",
        "from .. import load\n",
        "import mlx_dgemma\n",
        "import mlx_dgemma.engine as e\n",
        "from mlx_dgemma.cli.main import main\n",
        "from mlx_dgemma import convert\n",
        "def f():\n    from ..engine import load\n",
        "class A:\n    async def f(self):\n        if self:\n            from ..engine import load\n",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from ..engine import Engine\n",
    ],
)
def test_an_import_from_a_lower_room_is_found(text, tmp_path):
    (found,) = upward_imports(tree(tmp_path, {"mlx_dgemma/model/masks.py": text}))
    assert found.startswith("model.masks:")


def test_an_import_upwards_out_of_convert_is_found(tmp_path):
    root = tree(tmp_path, {"convert/folder.py": "def f():\n    from mlx_dgemma import engine\n"})
    assert upward_imports(root) == ["convert.folder:2 imports engine"]


@pytest.mark.parametrize(
    "text",
    [
        "from .layers import two\n",
        "def f():\n    from . import layers\n",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from .layers import Layer\n",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    import mlx_dgemma.model.layers\n",
    ],
)
def test_a_circle_is_found(text, tmp_path):
    root = tree(tmp_path, {"mlx_dgemma/model/masks.py": text})
    assert set(circle(root)) == {"model.layers", "model.masks"}
    assert upward_imports(root) == []


@pytest.mark.parametrize(
    "text",
    [
        "from .model.layers import _hidden\n",
        "from .model._parts import three\n",
        "from .model import _parts\n",
        "from .model import layers\n\nlayers._hidden()\n",
    ],
)
def test_a_private_name_of_another_room_is_found(text, tmp_path):
    (found,) = private_imports(tree(tmp_path, {"mlx_dgemma/engine.py": text}))
    assert found.startswith("engine:")


@pytest.mark.parametrize(
    "file", ["mlx_dgemma/model/masks.py", "convert/folder.py", "tests/model/test_masks.py", "bench/quality.py"]
)
def test_a_long_file_and_a_long_function_are_found(file, tmp_path):
    root = tree(tmp_path, {file: "x = 1\n" * 451})
    assert long_files(root) == [f"{file} has 451 lines"]
    body = '    """What it does."""\n' + "    x = 1\n" * 69
    tree(tmp_path, {file: f"class A:\n    def f(self): ...\n\n\nasync def f():\n{body}"})
    assert long_files(root) == []
    assert long_functions(root) == [f"{file}:5 f has 71 lines"]


def test_a_long_engine_is_found_and_written_tasks_are_not_measured(tmp_path):
    root = tree(tmp_path, {"mlx_dgemma/engine.py": "x = 1\n" * 301, "bench/tasks/chores.py": "x = 1\n" * 451})
    assert long_files(root) == ["mlx_dgemma/engine.py has 301 lines"]


def test_misplaced_modules_are_found(tmp_path):
    root = tree(tmp_path, {"mlx_dgemma/loop.py": "", "mlx_dgemma/attic/__init__.py": "", "mlx_dgemma/attic/old.py": ""})
    tree(root, {f"mlx_dgemma/model/part{number}.py": "" for number in range(13)})
    assert misplaced_modules(root) == [
        "attic is in a room without a place among the layers",
        "attic.old is in a room without a place among the layers",
        "loop stands at the root of the package",
        f"{PACKAGE}/model has 16 modules",
    ]


def test_what_benches_import_from_the_package_exists():
    """No other test runs them."""
    for file in sorted((ROOT / "bench").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
                module = import_module(node.module)
                for one in node.names:
                    there = hasattr(module, one.name)
                    if not there and hasattr(module, "__path__"):
                        there = find_spec(f"{node.module}.{one.name}") is not None
                    assert there, f"{file.name}:{node.lineno} imports {one.name} from {node.module}"
