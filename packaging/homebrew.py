"""Makes a Homebrew formula of a released sdist and its lock, without a network.

MACOSX_DEPLOYMENT_TARGET=14.0 uv pip compile requirements.in --format pylock.toml -o pylock.toml \\
    --python-version 3.12 --python-platform aarch64-apple-darwin
python packaging/homebrew.py dist/mlx_dgemma-1.0.0.tar.gz --url URL_OF_THE_SDIST --lock pylock.toml > mlx-dgemma.rb

requirements.in holds two lines: `mlx-dgemma[all] @ file:///.../mlx_dgemma-1.0.0.tar.gz`, and `hatchling`, which builds
the package. Of each locked package the formula takes a wheel that Apple silicon can use, else the sdist. Wheels are
installed as they are, because MLX is published as wheels alone and others need Rust to be built. The formula was never
given to Homebrew, since no Mac was at hand.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
import tarfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import tomllib
from packaging.tags import compatible_tags, cpython_tags, mac_platforms
from packaging.utils import canonicalize_name, parse_wheel_filename

PYTHON = (3, 12)
MACOS, MACOS_NAME = (14, 0), "sonoma"  # the oldest that MLX has wheels for
NAME = "mlx-dgemma"

FORMULA = """\
class MlxDgemma < Formula
  desc {description}
  homepage {homepage}
  url {url}
  sha256 {sha256}
  license {license}

  depends_on arch: :arm64
  depends_on macos: :{macos}
  depends_on "python@{python}"

{resources}
  def install
    python = Formula["python@{python}"].opt_libexec/"bin/python"
    system python, "-m", "venv", libexec
    pip = [libexec/"bin/python", "-m", "pip", "install", "--no-deps", "--no-index", "--no-build-isolation"]
    resources.each do |resource|
      resource.stage do
        wheel = Dir["*.whl"].first
        system(*pip, wheel || Pathname.pwd)
      end
    end
    system(*pip, buildpath)
    bin.install_symlink libexec/"bin/{name}"
  end

  test do
    assert_match "f r o g", shell_output("#{{bin}}/{name} generate --seed 0 'Spell the word frog.' </dev/null")
  end
end
"""


class LockError(Exception):
    """The lock does not fit the release; a sentence."""


def formula(sdist: Path, url: str, lock: dict[str, Any], homepage: str) -> str:
    """The text of the formula.

    Args:
        sdist: the released file.
        url: where Homebrew finds it.
        lock: a lock as PEP 751 defines it.
        homepage: address of the project.

    Raises:
        LockError: a package is missing in the lock, or has no file for Apple silicon.
    """
    metadata, needed = read_sdist(sdist)
    packages = {canonicalize_name(one["name"]): one for one in lock.get("packages", [])}
    packages.pop(NAME, None)
    for name in needed:
        if name not in packages:
            raise LockError(f"The lock has no {name}, which the release needs; lock it together with the release.")
    # What builds others comes first.
    order = sorted(packages, key=lambda name: (not best_file(packages[name])["url"].endswith(".whl"), name))
    return FORMULA.format(
        description=quoted((metadata["Summary"] or NAME).partition(":")[0]),
        homepage=quoted(homepage),
        url=quoted(url),
        sha256=quoted(hashlib.sha256(sdist.read_bytes()).hexdigest()),
        license=quoted(metadata["License-Expression"]),
        macos=MACOS_NAME,
        python=".".join(map(str, PYTHON)),
        resources="\n".join(resource(name, best_file(packages[name])) for name in order),
        name=NAME,
    )


def read_sdist(sdist: Path) -> tuple[Message, set[str]]:
    """Its PKG-INFO, and the names of what building and running it needs on a Mac.

    Raises:
        LockError: it is no sdist of this project.
    """
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].partition("/")[0]
        texts = []
        for name in ("PKG-INFO", "pyproject.toml"):
            try:
                member = archive.extractfile(f"{root}/{name}")
            except KeyError:
                member = None
            if member is None:
                raise LockError(f"{sdist} has no {name}; give a released sdist.")
            texts.append(member.read().decode("utf-8"))
    metadata, project = Parser().parsestr(texts[0]), tomllib.loads(texts[1])
    if metadata["Name"] != NAME:
        raise LockError(f"{sdist} is {metadata['Name']}, not {NAME}; give the project's own sdist.")
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    wanted = [one for one in wanted if "python_version <" not in one]  # of Pythons before the formula's
    return metadata, {canonicalize_name(re.match(r"[\w.-]+", one)[0]) for one in wanted}


def best_file(package: dict[str, Any]) -> dict[str, Any]:
    """The entry of the package's wheel that fits best, else of its sdist.

    Raises:
        LockError: there is neither.
    """
    platforms = [*mac_platforms(MACOS, "arm64")]
    interpreter = f"cp{PYTHON[0]}{PYTHON[1]}"
    tags = [*cpython_tags(PYTHON, platforms=platforms), *compatible_tags(PYTHON, interpreter, platforms)]
    rank = {tag: place for place, tag in enumerate(tags)}
    found = []
    for wheel in package.get("wheels", []):
        *_, offered = parse_wheel_filename(wheel["url"].rpartition("/")[2].partition("#")[0])
        places = [rank[tag] for tag in offered if tag in rank]
        if places:
            found.append((min(places), wheel))
    if found:
        return min(found, key=lambda one: one[0])[1]
    if "sdist" in package:
        return package["sdist"]
    raise LockError(f"The lock has no file of {package['name']} for macOS on arm64 and Python {PYTHON[0]}.{PYTHON[1]}.")


def resource(name: str, file: dict[str, Any]) -> str:
    """One resource of the formula. A wheel is not unpacked, for pip wants it whole."""
    using = ", using: :nounzip" if file["url"].endswith(".whl") else ""
    return (
        f"  resource {quoted(name)} do\n"
        f"    url {quoted(file['url'])}{using}\n"
        f"    sha256 {quoted(file['hashes']['sha256'])}\n"
        "  end\n"
    )


def quoted(text: str) -> str:
    """A Ruby string."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("#", "\\#") + '"'


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sdist", type=Path)
    parser.add_argument("--url", required=True, help="where Homebrew finds the sdist")
    parser.add_argument("--lock", type=Path, required=True, help="pylock.toml of the release with all extras")
    parser.add_argument("--homepage", help="address of the project; that of the URL's host without it")
    given = parser.parse_args()
    try:
        lock = tomllib.loads(given.lock.read_text(encoding="utf-8"))
        homepage = given.homepage or "/".join(given.url.split("/")[:5])
        sys.stdout.write(formula(given.sdist, given.url, lock, homepage))
    except (LockError, OSError, tomllib.TOMLDecodeError, tarfile.TarError) as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
