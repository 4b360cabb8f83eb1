"""Pictures to patches: whatever holds a picture is read, scaled to a budget of soft tokens and cut up.

Pixels are those of Transformers' Pillow-based image processor, bit for bit: bicubic, rounded to bytes, divided by 255.
It differs in three points: orientation is applied, transparency is laid on white, and 16-bit values are scaled.
Colour profiles are ignored, as there.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import io
import math
import os
import stat
import urllib.parse
import warnings
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import PromptError
from ..installation import add_extra
from ..model.patches import Patches, check_budget, join
from .paths import local_path

MAX_PIXELS = 50_000_000
"""More are refused before decoding. WebP's decoder holds four copies: this keeps one picture below 1 GB."""

# Left out: formats that Pillow hands to another program or sees in almost any bytes, and JPEG 2000 (8 copies).
FORMATS = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "HEIF")
_KNOWN = "PNG, JPEG, GIF, WebP, TIFF, BMP, PPM or AVIF"
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_STRIP = 4_000_000  # pixels converted at a time

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class FileBytes(bytes):
    """What a file holds, with the name under which errors tell of it."""

    name: str

    @classmethod
    def of(cls, data: bytes, name: str) -> FileBytes:
        """The bytes with their file's name."""
        file = cls(data)
        file.name = name
        return file


def open_image(source: Any) -> Image.Image:
    """An upright RGB picture without transparency.

    Args:
        source: what `open_file` takes, a PIL image, or an array [H, W] or
            [H, W, 3 or 4] of uint8, uint16, or floats from 0 to 1. Of several frames the first is taken.

    Raises:
        PromptError: it cannot be read, is no picture, is damaged, or is too large.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        return _upright(*_decode("The PIL image", lambda: source))
    name, file = open_file(source)
    with file:
        return _upright(*_decode(name, lambda: _identify(name, file)))


def open_file(source: Any) -> tuple[str, BinaryIO]:
    """A name for error messages and the open file of a source; nothing is fetched.

    Args:
        source: a path, also as a terminal writes it; a `file:` or `data:` URL; bytes; or an open binary file, which is
            read from its beginning.

    Raises:
        PromptError: there is no such file, it is no regular file, it is empty, or it lies on the web.
    """
    if hasattr(source, "read"):
        source = _whole(source)
    if isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
        name = source.name if isinstance(source, FileBytes) else f"The file of {len(data)} bytes"
        return _filled(name, io.BytesIO(data), len(data))
    if not isinstance(source, (str, os.PathLike)):
        raise PromptError(
            f"A value of type {type(source).__name__} cannot be seen; give a path, bytes, a data: URL, "
            "a PIL image or an array."
        )
    path = os.fspath(source)
    name = _short(os.fsdecode(path))
    scheme = name[:8].lower()
    if scheme.startswith("data:"):
        data = _from_data_url(name, os.fsdecode(path))
        return _filled(name, io.BytesIO(data), len(data))
    if scheme.startswith(("http://", "https://")):
        raise PromptError(f"{name} is a web address, and nothing is fetched; download it and give the file.")
    if isinstance(path, str):
        path = local_path(path)
        name = _short(path)
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise PromptError(f"{name} is a folder; give a file.")
        if not stat.S_ISREG(status.st_mode):
            raise PromptError(f"{name} is a device or a pipe; give a regular file.")
        return _filled(name, open(path, "rb"), status.st_size)
    except FileNotFoundError:
        raise PromptError(f"{name} does not exist.") from None
    except (OSError, ValueError) as error:
        raise PromptError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _whole(file: Any) -> bytes:
    """The bytes of an open file, wherever it stands."""
    try:
        if file.seekable():
            file.seek(0)
        data = file.read()
    except (OSError, ValueError, AttributeError) as error:
        raise PromptError(f"The open file cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    if not isinstance(data, bytes):
        raise PromptError(f"The open file gives {type(data).__name__}; open it in binary mode.")
    return data


def _filled(name: str, file: BinaryIO, size: int) -> tuple[str, BinaryIO]:
    if size == 0:
        file.close()
        raise PromptError(f"{name} is empty.")
    return name, file


def _short(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:60]}...{text[-20:]}"


def _from_data_url(name: str, url: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise PromptError(f"{name} is no data: URL; it should look like data:image/png;base64,iVBORw0...")
    data = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise PromptError(f"{name} holds broken base64: {error}.") from None


def _identify(name: str, file: BinaryIO) -> Image.Image:
    Image.init()  # otherwise formats that are not loaded yet are missing from the table
    start = file.read(12)
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC:
        with contextlib.suppress(ImportError):
            import pillow_heif

            pillow_heif.register_heif_opener()
        if "HEIF" not in Image.OPEN:
            raise PromptError(f"{name} is a HEIC picture; save it as JPEG or PNG, or run `{add_extra('pictures')}`.")
    if start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis") and "AVIF" not in Image.OPEN:
        raise PromptError(f"{name} is an AVIF picture; save it as JPEG or PNG, or pip install -U pillow.")
    file.seek(0)
    return Image.open(file, formats=[known for known in FORMATS if known in Image.OPEN])


def _decode(name: str, opened: Callable[[], Image.Image]) -> tuple[Image.Image, int]:
    """The picture as RGB, and its EXIF orientation. The decoded original is given back before anything turns."""
    several = False
    try:
        image = opened()
        width, height = image.size
        if width < 1 or height < 1:
            raise PromptError(f"{name} has no pixels: its size is {width} x {height}.")
        _check_pixels(name, width, height)
        # The second picture of an MPO is a depth or gain map of the first.
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(name, image)
    except PromptError:
        raise
    except Image.DecompressionBombError:
        raise PromptError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels; make it smaller.") from None
    except UnidentifiedImageError:
        raise PromptError(f"{name} is no picture that can be read; give a {_KNOWN} file.") from None
    except Exception as error:  # decoders raise what they like
        reason = str(error).rstrip(".") or type(error).__name__
        raise PromptError(f"{name} is cut short or damaged ({reason}).") from None
    if several:
        warnings.warn(f"{name} holds several frames; only the first is taken.", stacklevel=3)
    return rgb, orientation


def _check_pixels(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise PromptError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are read, so make it smaller."
        )


def _orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # damaged EXIF says nothing about the picture, which may still be whole
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    if orientation not in _UPRIGHT:
        return image
    turned = image.transpose(_UPRIGHT[orientation])
    turned.info = {}  # the EXIF in there would have it turned again
    return turned


def _to_rgb(name: str, image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image

    def rows(top: int, bottom: int) -> Image.Image:
        strip = image.crop((0, top, image.width, bottom))
        return Image.fromarray(_to_bytes(name, np.asarray(strip))) if strip.mode[0] in "IF" else strip

    return _on_white(*image.size, rows)


def _from_array(array: np.ndarray) -> Image.Image:
    flat = array.ndim == 2
    if not (flat or (array.ndim == 3 and array.shape[2] in (3, 4))) or not (
        array.dtype in (np.uint8, np.uint16) or array.dtype.kind == "f"
    ):
        raise PromptError(
            f"An array {list(array.shape)} of {array.dtype} is no picture; give [height, width] or "
            "[height, width, 3 or 4] of uint8, uint16, or floats from 0 to 1."
        )
    height, width = array.shape[:2]
    name = f"The array {list(array.shape)}"
    if not array.size:
        raise PromptError(f"{name} has no pixels: its size is {width} x {height}.")
    _check_pixels(name, width, height)
    return _on_white(width, height, lambda top, bottom: Image.fromarray(_to_bytes(name, array[top:bottom])))


def _to_bytes(name: str, values: np.ndarray) -> np.ndarray:
    """uint8 of values whose top is 255, 65535 or 1.0, by their type (Pillow widens 16 bits to int32)."""
    if values.dtype == np.uint8:
        return np.ascontiguousarray(values)
    top = 1.0 if values.dtype.kind == "f" else 65535.0
    outside = values[~((values >= 0) & (values <= top))]
    if outside.size:
        raise PromptError(f"{name} has the value {outside[0]:g}; its values should lie from 0 to {top:g}.")
    return (values * (255 / top) + 0.5).astype(np.uint8)


def _on_white(width: int, height: int, rows: Callable[[int, int], Image.Image]) -> Image.Image:
    """An RGB picture of `rows(top, bottom)`, laid on white; a strip at a time, to hold no third copy."""
    page = Image.new("RGB", (width, height), "white")
    step = max(1, _STRIP // width)
    for top in range(0, height, step):
        strip = rows(top, min(top + step, height)).convert("RGBA")
        page.paste(strip, (0, top), strip)
    return page


def target_size(width: int, height: int, budget: int, patch: int = 16, pooling: int = 3) -> tuple[int, int]:
    """(width, height) in pixels that a picture is scaled to.

    Both sides are multiples of a soft token's side, patch * pooling, rounded down from the size that has the
    picture's proportions and the budget's area. A picture more elongated than the budget is long becomes one
    strip of the whole budget, squeezed, as in Transformers: no picture is too narrow.

    Raises:
        OptionError: the budget is not one of BUDGETS.
    """
    check_budget(budget)
    side = patch * pooling
    # Written in this order, a proportion on the border rounds the same way as in Transformers.
    factor = math.sqrt(budget * side**2 / (width * height))
    columns, rows = int(factor * width / side), int(factor * height / side)
    if rows == 0:
        rows, columns = 1, min(width // height, budget)
    elif columns == 0:
        rows, columns = min(height // width, budget), 1
    return columns * side, rows * side


def patchify(images: Iterable[Image.Image], budget: int, patch: int = 16, pooling: int = 3) -> Patches:
    """Scale RGB pictures to a budget of soft tokens each, and cut them into patches.

    Args:
        images: one or more pictures as `open_image` gives them.
        budget: the most soft tokens of a picture, one of BUDGETS.
        patch: side of a patch in pixels.
        pooling: side of a soft token in patches.

    Raises:
        OptionError: the budget is not one of BUDGETS.
    """
    check_budget(budget)
    parts = []
    for image in images:
        size = target_size(*image.size, budget, patch, pooling)
        if max(image.size) >= (budget + 1) * min(image.size):
            warnings.warn(
                f"A picture of {image.width} x {image.height} pixels is more elongated than {budget} soft tokens in a "
                "row; it is squeezed, so crop it to see it in proportion.",
                stacklevel=2,
            )
        pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        columns, rows = size[0] // patch, size[1] // patch
        cut = pixels.reshape(rows, patch, columns, patch, 3).swapaxes(1, 2).reshape(1, rows * columns, -1)
        y, x = np.divmod(np.arange(rows * columns, dtype=np.int32), np.int32(columns))
        tokens = rows * columns // pooling**2
        parts.append(Patches(cut, np.stack([x, y], axis=-1)[None], (tokens,)))
    return join(parts)


def digest(image: Image.Image) -> str:
    """SHA-256 (hex) of an RGB picture's size and pixels: equal pictures share it, whatever file they came from."""
    seen = hashlib.sha256(f"{image.width}x{image.height}".encode())
    step = max(1, _STRIP // image.width)
    for top in range(0, image.height, step):
        seen.update(image.crop((0, top, image.width, min(top + step, image.height))).tobytes())
    return seen.hexdigest()
