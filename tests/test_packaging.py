"""What an installation gives: the dependencies it names, and a package that shows its public names."""

import ast
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_dgemma
from mlx_dgemma import convert

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = ("video", "pictures", "audio", "chat", "gguf", "serve")
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}  # where the module has another name


def names_of(requirements):
    return {re.match(r"[\w-]+", one)[0] for one in requirements}


def imported_distributions():
    """The distributions that modules of the package import, wherever in a file the import stands."""
    found = set()
    for folder in ("mlx_dgemma", "convert"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and not node.level:
                    found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "mlx_dgemma", "tomllib"}  # which Python 3.10 lacks: tomli there
    return {DISTRIBUTIONS.get(name, name.replace("_", "-")) for name in found}


def test_what_the_package_imports_is_named_as_a_dependency():
    # mlx-lm imports transformers; it is named for its lower bound
    extras = PROJECT["optional-dependencies"]
    optional = names_of(one for extra in EXTRAS for one in extras[extra])
    hosts = {"llm", "lm-eval"}  # which import the modules of plugins/
    assert imported_distributions() - hosts | {"transformers"} == names_of(PROJECT["dependencies"]) | optional


def test_dependencies_have_lower_bounds():
    extras = PROJECT["optional-dependencies"]
    for one in (
        *PROJECT["dependencies"],
        *(one for extra in EXTRAS for one in extras[extra]),
    ):
        assert re.fullmatch(r"[\w-]+>=[\d.]+(,<[\d.]+)?(; python_version < '[\d.]+')?", one), one


def test_the_extra_all_holds_every_extra_that_is_not_a_backend_or_for_tests():
    extras = PROJECT["optional-dependencies"]
    (one,) = extras["all"]
    named = re.fullmatch(r"mlx-dgemma\[([\w,]+)\]", one)[1].split(",")
    assert sorted(named) == sorted(extras.keys() - {"cpu", "cuda13", "test", "all"})


def test_dir_shows_the_public_names():
    assert set(dir(mlx_dgemma)) == {*mlx_dgemma.__all__, "__version__"}


def test_listing_the_package_imports_no_mlx():
    code = "import sys, mlx_dgemma, mlx_dgemma.convert; dir(mlx_dgemma); sys.exit('mlx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


def test_the_package_contains_its_rooms_alone():
    contents = {one.name for one in pkgutil.iter_modules(mlx_dgemma.__path__)}
    assert {"cli", "engine", "model"} <= contents
    assert not contents & {"mlx_dgemma", "tests", "bench", "conftest"}


def test_convert_is_a_part_of_the_package():
    assert convert is mlx_dgemma.convert is sys.modules["mlx_dgemma.convert"]
    assert convert.__name__ == "mlx_dgemma.convert"
    assert convert.Recipe is sys.modules["mlx_dgemma.convert.recipes"].Recipe
    assert "convert" not in sys.modules
