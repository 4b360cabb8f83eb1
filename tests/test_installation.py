"""The command that adds an extra, for every way in which a copy is installed, from files as the tools write them."""

import json

import pytest

from mlx_dgemma import installation
from mlx_dgemma.installation import Installation, add_extra, read_installation

FOLDER = json.dumps({"url": "file:///Users/me/mlx%20dgemma", "dir_info": {}})
EDITABLE = json.dumps({"url": "file:///Users/me/mlx-dgemma", "dir_info": {"editable": True}})
WHEEL = json.dumps({"url": "file:///tmp/mlx_dgemma-1.whl", "archive_info": {}})
GIT = json.dumps(
    {"url": "https://host/me/it.git", "vcs_info": {"vcs": "git", "requested_revision": "v1", "commit_id": "0"}}
)
RECEIPT = '[tool]\nrequirements = [{ name = "mlx-dgemma", extras = ["serve", "video"], directory = "/d" }]\n'
PIPX = json.dumps({"main_package": {"package": "mlx-dgemma", "package_or_url": "mlx-dgemma[serve, chat]"}})


@pytest.mark.parametrize(
    ("files", "origin", "installer", "command"),
    [
        ({}, None, "pip\n", "/e/bin/python -m pip install 'mlx-dgemma[gguf]'"),
        ({}, FOLDER, "pip\n", "/e/bin/python -m pip install '/Users/me/mlx dgemma[gguf]'"),
        ({}, EDITABLE, "pip\n", "/e/bin/python -m pip install -e '/Users/me/mlx-dgemma[gguf]'"),
        ({}, EDITABLE, "uv", "uv pip install --python /e/bin/python -e '/Users/me/mlx-dgemma[gguf]'"),
        ({}, WHEEL, None, "/e/bin/python -m pip install 'mlx-dgemma[gguf] @ file:///tmp/mlx_dgemma-1.whl'"),
        ({}, GIT, "pip", "/e/bin/python -m pip install 'mlx-dgemma[gguf] @ git+https://host/me/it.git@v1'"),
        ({"uv-receipt.toml": RECEIPT}, None, "uv", "uv tool install 'mlx-dgemma[gguf,serve,video]'"),
        ({"uv-receipt.toml": "[tool]\n"}, FOLDER, "uv", "uv tool install '/Users/me/mlx dgemma[gguf]'"),
        ({"pipx_metadata.json": PIPX}, None, "pip", "pipx install --force 'mlx-dgemma[chat,gguf,serve]'"),
        ({"pipx_metadata.json": "{}"}, EDITABLE, "pip", "pipx install --force -e '/Users/me/mlx-dgemma[gguf]'"),
    ],
)
def test_the_command_fits_the_way_of_installation(tmp_path, files, origin, installer, command):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = read_installation(tmp_path, "/e/bin/python", origin, installer)
    assert found.command("gguf") == command
    assert found.program() == ["/e/bin/python", "-m", "mlx_dgemma"]


def test_a_copy_of_homebrew_is_named_by_the_path_that_stays(tmp_path):
    prefix = tmp_path / "Cellar" / "mlx-dgemma" / "1.0" / "libexec"
    found = read_installation(prefix, f"{prefix}/bin/python", None, "pip")
    assert found.command("serve") == "brew reinstall mlx-dgemma"
    assert found.program() == [f"{tmp_path}/bin/mlx-dgemma"]


def test_a_checkout_that_was_not_installed_names_its_own_folder(monkeypatch):
    def absent(name):
        raise installation.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installation.metadata, "distribution", absent)
    found = installation.this_copy()
    assert isinstance(found, Installation)
    assert (installation.Path(found.source) / "pyproject.toml").exists()
    assert "-m pip install -e " in add_extra("serve")
