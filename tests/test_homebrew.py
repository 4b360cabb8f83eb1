"""packaging/homebrew.py: a formula of a small sdist and its lock. No Homebrew was at hand."""

import hashlib
import importlib.util
import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

if sys.version_info < (3, 11):
    pytest.skip("the script needs tomllib", allow_module_level=True)

SCRIPT = Path(__file__).parent.parent / "packaging" / "homebrew.py"
INFO = "Metadata-Version: 2.4\nName: mlx-dgemma\nVersion: 1.0\nSummary: A model: x\nLicense-Expression: Apache-2.0\n"
PROJECT = """\
[build-system]
requires = ["hatchling>=1"]
[project]
dependencies = ["mlx>=0.1", "Quick.Thing>=2", "tomli>=2; python_version < '3.11'"]
"""
FILES = {
    "mlx": ["mlx-1-cp312-cp312-macosx_26_0_arm64.whl", "mlx-1-cp312-cp312-macosx_14_0_arm64.whl", "mlx-1.tar.gz"],
    "quick-thing": ["quick_thing-2-cp39-abi3-macosx_11_0_arm64.whl", "quick_thing-2-cp313-cp313-macosx_11_0_arm64.whl"],
    "hatchling": ["hatchling-1-py3-none-any.whl"],
    "deep": ["deep-1-cp312-cp312-macosx_10_9_x86_64.whl", "deep-1.tar.gz"],
    "mlx-dgemma": ["mlx_dgemma-1.0.tar.gz"],
}


def homebrew():
    spec = importlib.util.spec_from_file_location("homebrew", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(name, files):
    found = [{"url": f"https://host/{file}", "hashes": {"sha256": f"hash of {file}"}} for file in files]
    wheels = [one for one in found if one["url"].endswith(".whl")]
    sdists = [("sdist", one) for one in found if one not in wheels]
    return {"name": name, "wheels": wheels, **dict(sdists)}


@pytest.fixture
def sdist(tmp_path):
    path = tmp_path / "mlx_dgemma-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in (("PKG-INFO", INFO), ("pyproject.toml", PROJECT)):
            member = tarfile.TarInfo(f"mlx_dgemma-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def test_the_formula_takes_the_best_file_of_every_locked_package(sdist, tmp_path):
    lock = {"packages": [entry(*one) for one in FILES.items()]}
    text = homebrew().formula(sdist, "https://host/a#1.tar.gz", lock, "https://host")
    head = [
        'class MlxDgemma < Formula', '  desc "A model"', '  homepage "https://host"', '  url "https://host/a\\#1.tar.gz"',
        f'  sha256 "{hashlib.sha256(sdist.read_bytes()).hexdigest()}"', '  license "Apache-2.0"',
    ]  # fmt: skip
    assert text.splitlines()[:6] == head
    chosen = [
        ("hatchling", "hatchling-1-py3-none-any.whl"), ("mlx", "mlx-1-cp312-cp312-macosx_14_0_arm64.whl"),
        ("quick-thing", "quick_thing-2-cp39-abi3-macosx_11_0_arm64.whl"), ("deep", "deep-1.tar.gz"),
    ]  # fmt: skip
    blocks = text.split('  resource "')[1:]
    assert [block.partition('"')[0] for block in blocks] == [name for name, _ in chosen]
    for block, (_, file) in zip(blocks, chosen):
        assert f'url "https://host/{file}"' in block
        assert (", using: :nounzip" in block) == file.endswith(".whl")
        assert f'sha256 "hash of {file}"' in block
    if shutil.which("ruby"):
        (tmp_path / "f.rb").write_text(text)
        subprocess.run(["ruby", "-c", str(tmp_path / "f.rb")], check=True, capture_output=True)


def test_a_lock_that_does_not_fit_is_refused(sdist):
    module = homebrew()
    packages = {name: entry(name, files) for name, files in FILES.items()}

    def refusal(changed):
        with pytest.raises(module.LockError) as refused:
            module.formula(sdist, "https://host/a", {"packages": [*changed.values()]}, "https://host")
        return str(refused.value)

    assert refusal({name: one for name, one in packages.items() if name != "quick-thing"}).startswith(
        "The lock has no quick-thing, which the release needs;"
    )
    packages["deep"].pop("sdist")
    assert refusal(packages) == "The lock has no file of deep for macOS on arm64 and Python 3.12."
