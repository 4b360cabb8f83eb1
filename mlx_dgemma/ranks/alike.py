"""Whether two ranks have the same checkpoint: digests that are quick to make, since weights may be 50 GB."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path

from ..adapters import peft

SAMPLES, SAMPLE_BYTES = (
    16,
    2**14,
)  # of each file of weights: pieces at equal distances, the first and the last among them
Digests = dict[str, str]  # by the name of a file


def digest_of(folder: Path, adapter: str | Path | None = None) -> Digests:
    """Digests of the files of a checkpoint and an adapter, of which the results depend."""
    files = [one for one in folder.iterdir() if one.suffix in (".json", ".jinja", ".safetensors")]
    if adapter is not None:
        files += [peft.find(adapter) / name for name in (peft.CONFIG, peft.WEIGHTS)]
    return {file.name: _digest(file) for file in sorted(files)}


def told_apart(mine: Digests, theirs: Digests | str) -> str | None:
    """What another rank has that rank 0 has not, as the end of a sentence; None: they are alike.

    Args:
        mine: of rank 0.
        theirs: of the other rank; a text says why it has none.
    """
    if isinstance(theirs, str):
        return f"cannot load the checkpoint: {theirs}"
    other = [name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name)]
    if not other:
        return None
    return f"has another {other[0]} than rank 0, so its checkpoint is another one; give every machine the same files."


def _digest(file: Path) -> str:
    size, found = file.stat().st_size, sha256()
    found.update(str(size).encode())
    with file.open("rb") as opened:
        if file.suffix != ".safetensors" or size <= SAMPLES * SAMPLE_BYTES:
            found.update(opened.read())
        else:
            for i in range(SAMPLES):
                opened.seek((size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                found.update(opened.read(SAMPLE_BYTES))
    return found.hexdigest()
