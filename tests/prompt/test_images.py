"""Pictures: pixels and sizes against Transformers, every kind of input, and every mistake."""

import base64
import csv
import io
import os
import re
import resource
import sys
import types
import warnings

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file
from support import DATA

from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.installation import add_extra
from mlx_dgemma.model.patches import BUDGETS, join
from mlx_dgemma.prompt import images
from mlx_dgemma.prompt.images import MAX_PIXELS, digest, open_image, patchify, target_size

RED, BLUE, WHITE = (255, 0, 0), (0, 0, 255), (255, 255, 255)


def noise(width=40, height=30, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def saved(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def refusal(source):
    with pytest.raises(PromptError) as caught:
        open_image(source)
    return str(caught.value)


@pytest.mark.parametrize("name, files", [("image", ["image_0"]), ("two_images", ["two_images_0", "two_images_1"])])
def test_patches_equal_transformers(name, files):
    held = load_file(DATA / f"{name}.safetensors")
    made = patchify([open_image(DATA / f"{file}.png") for file in files], 70)
    length = made.patches.shape[1]
    assert (made.pixels.dtype, made.patches.dtype, made.positions.dtype) == (np.uint8, np.float32, np.int32)
    assert np.array_equal(made.patches, held["pixel_values"][:, :length].astype(np.float32) / 255)
    assert np.array_equal(made.positions, held["image_position_ids"][:, :length])
    assert not held["pixel_values"][:, length:].any() and (held["image_position_ids"][:, length:] == -1).all()
    assert made.tokens == {"image": (66,), "two_images": (66, 63)}[name]


def test_target_sizes_equal_transformers():
    with open(DATA / "target_sizes.csv") as file:
        rows = [[int(value) for value in row] for row in list(csv.reader(file))[1:]]
    assert len(rows) > 300 and {row[2] for row in rows} == set(BUDGETS)
    for width, height, budget, *target in rows:
        assert target_size(width, height, budget) == tuple(target)
        assert target[0] * target[1] <= budget * 48 * 48


def test_an_elongated_picture_is_squeezed_with_a_warning():
    sentence = (
        "A picture of 142 x 2 pixels is more elongated than 70 soft tokens in a row; "
        "it is squeezed, so crop it to see it in proportion."
    )
    with pytest.warns(UserWarning) as caught:
        patchify([Image.new("RGB", (142, 2))], 70)
    assert [str(one.message) for one in caught] == [sentence]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patchify([Image.new("RGB", (141, 2))], 70)


@pytest.mark.filterwarnings("ignore:A picture of")
def test_an_elongated_picture_becomes_one_strip():
    assert target_size(10_000, 10, 70) == (70 * 48, 48)
    assert target_size(1, 5000, 280) == (48, 280 * 48)
    made = patchify([Image.new("RGB", (10_000, 10))], 70)
    assert made.tokens == (70,) and made.positions.max(axis=1).tolist() == [[209, 2]]


def test_patches_hold_their_pixels_row_by_row():
    size = target_size(528, 288, 70)
    assert size == (528, 288)  # nothing is scaled
    picture = noise(*size)
    made, pixels = patchify([picture], 70), np.asarray(picture)
    for i in (0, 1, size[0] // 16, made.patches.shape[1] - 1):
        x, y = made.positions[0, i]
        square = pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16]
        assert np.array_equal(made.patches[0, i], square.reshape(-1).astype(np.float32) / 255)
        assert (x, y) == (i % (size[0] // 16), i // (size[0] // 16))


@pytest.mark.filterwarnings("ignore:A picture of")
def test_shorter_pictures_are_padded_and_join_is_patchify_of_all():
    pictures = [noise(100, 100), noise(37, 500, seed=1), noise(2000, 10, seed=2)]
    whole, joined = patchify(pictures, 140), join([patchify([picture], 140) for picture in pictures])
    assert np.array_equal(whole.patches, joined.patches) and np.array_equal(whole.positions, joined.positions)
    assert whole.tokens == joined.tokens and whole.patches.shape[1] == 9 * max(whole.tokens)
    for i, tokens in enumerate(whole.tokens):
        assert (whole.positions[i, : 9 * tokens] >= 0).all() and (whole.positions[i, 9 * tokens :] == -1).all()
        assert not whole.patches[i, 9 * tokens :].any()
    assert len({digest(picture) for picture in pictures}) == 3


@pytest.mark.parametrize("budget", [0, 71, True, "280", 280.5])
def test_a_budget_outside_the_five_is_refused(budget):
    message = f"image_tokens is {budget!r}; it should be one of 70, 140, 280, 560, 1120."
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        patchify([noise()], budget)


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    picture = noise()
    data = saved(picture)
    path = tmp_path / "picture.jpg"  # the name says JPEG, the content counts
    path.write_bytes(data)
    encoded = base64.b64encode(data).decode()
    percent = "".join(f"%{byte:02x}" for byte in data)
    sources = [path, str(path), os.fsencode(path).decode(), data, bytearray(data), memoryview(data), picture]
    sources += [f"data:image/png;base64,{encoded}", f"DATA:;Base64,{encoded[:40]}\n{encoded[40:]}", f"data:,{percent}"]
    sources += [np.asarray(picture), np.asarray(picture).astype(np.uint16) * 257]
    sources += [(np.asarray(picture) / 255).astype(kind) for kind in (np.float32, np.float64)]
    for source in sources:
        opened = open_image(source)
        assert opened.mode == "RGB" and np.array_equal(np.asarray(opened), np.asarray(picture))
        assert digest(opened) == digest(picture)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "BMP", "PPM", "GIF", "WEBP", "JPEG", "AVIF"])
def test_every_format_is_read(kind):
    if kind == "AVIF" and "AVIF" not in Image.SAVE:
        pytest.skip("this Pillow has no AVIF")
    made = np.asarray(open_image(saved(Image.new("RGB", (40, 30), (200, 100, 50)), kind)))
    assert made.shape == (30, 40, 3)
    assert np.abs(made.astype(int) - (200, 100, 50)).max() <= (0 if kind in ("PNG", "TIFF", "BMP", "PPM") else 8)


def modes():
    """(picture, the RGB of its first pixel)."""
    palette = Image.new("P", (2, 1))
    palette.putpalette([*RED, *BLUE])
    see_through = palette.copy()
    see_through.info["transparency"] = 0
    keyed = Image.new("RGB", (2, 1), RED)
    keyed.info["transparency"] = RED
    wide = Image.fromarray(np.full((1, 2), 0x8000, np.uint16))
    yield "1", Image.new("1", (2, 1), 1), WHITE
    yield "L", Image.new("L", (2, 1), 77), (77, 77, 77)
    yield "LA", Image.new("LA", (2, 1), (0, 51)), (204, 204, 204)
    yield "P", palette, RED
    yield "P with transparency", see_through, WHITE
    half = Image.new("PA", (2, 1), (0, 51))
    half.putpalette([*RED, *BLUE])
    yield "PA", half, (255, 204, 204)
    yield "RGB with a key", keyed, WHITE
    yield "RGBA", Image.new("RGBA", (2, 1), (0, 0, 255, 51)), (204, 204, 255)
    yield "RGBa", Image.new("RGBA", (2, 1), (0, 0, 255, 51)).convert("RGBa"), (204, 204, 255)
    yield "CMYK", Image.new("CMYK", (2, 1), (0, 255, 255, 0)), RED
    yield "YCbCr", Image.new("RGB", (2, 1), WHITE).convert("YCbCr"), WHITE
    yield "HSV", Image.new("HSV", (2, 1), (0, 255, 255)), RED
    yield "I;16", wide, (128, 128, 128)
    yield "I", Image.new("I", (2, 1), 0x8000), (128, 128, 128)
    yield "F", Image.new("F", (2, 1), 0.5), (128, 128, 128)


@pytest.mark.parametrize("name, image, colour", [pytest.param(*case, id=case[0]) for case in modes()])
def test_every_mode_becomes_rgb_on_white(name, image, colour):
    opened = open_image(image)
    assert opened.mode == "RGB" and opened.size == (2, 1) and opened.getpixel((0, 0)) == colour


@pytest.mark.parametrize("mode, kind", [("P with transparency", "PNG"), ("I;16", "PNG"), ("I;16", "TIFF")])
@pytest.mark.parametrize("height", [1, 3000])
def test_modes_read_from_files_in_strips(mode, kind, height, monkeypatch):
    monkeypatch.setattr(images, "_STRIP", 1000)
    image, colour = next((image, colour) for name, image, colour in modes() if name == mode)
    transparent = {"transparency": 0} if mode.startswith("P") else {}
    opened = open_image(saved(image.resize((2, height), Image.Resampling.NEAREST), kind, **transparent))
    assert opened.size == (2, height) and {opened.getpixel((0, y)) for y in (0, height // 2, height - 1)} == {colour}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(kind, orientation):
    upright = Image.new("RGB", (48, 32), WHITE)
    upright.paste(RED, (0, 0, 16, 16))
    upright.paste(BLUE, (32, 0, 48, 16))
    undo = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    how = undo.get(orientation, images._UPRIGHT.get(orientation))  # all others are their own inverse
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = upright if how is None else upright.transpose(how)
    data = saved(stored, kind, exif=exif, **({"quality": 100} if kind in ("JPEG", "WEBP") else {}))
    once = open_image(data)
    for opened in (once, open_image(once), open_image(Image.open(io.BytesIO(data)))):
        assert np.abs(np.asarray(opened).astype(int) - np.asarray(upright)).mean() < 5


def test_the_first_of_several_frames_is_taken_with_a_warning():
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        second = Image.new("RGB", (20, 20), BLUE)
        data = saved(Image.new("RGB", (20, 20), RED), kind, save_all=True, append_images=[second])
        with pytest.warns(UserWarning) as caught:
            opened = open_image(data)
        message = f"The file of {len(data)} bytes holds several frames; only the first is taken."
        assert [str(warning.message) for warning in caught] == [message]
        assert caught[0].filename == __file__
        assert patchify([opened], 70).patches[0, 0, :3].tolist() == pytest.approx([1, 0, 0], abs=0.02)
    data = saved(noise(), "MPO", save_all=True, append_images=[noise()])  # a phone's picture with its depth map
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(data).size == (40, 30)


def test_files_that_cannot_be_opened(tmp_path):
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe")
    nowhere = tmp_path / "nowhere.png"
    assert refusal(nowhere) == f"{images._short(str(nowhere))} does not exist."
    assert refusal(tmp_path) == f"{images._short(str(tmp_path))} is a folder; give a file."
    assert refusal(str(tmp_path / "empty.png")).endswith("empty.png is empty.")
    assert refusal(tmp_path / "pipe").endswith("pipe is a device or a pipe; give a regular file.")
    assert refusal("/dev/null") == "/dev/null is a device or a pipe; give a regular file."
    assert refusal("a\0b") == "a\0b cannot be read: embedded null byte."
    assert refusal("x" * 5000) == f"{'x' * 60}...{'x' * 20} cannot be read: File name too long."
    assert refusal(b"") == "The file of 0 bytes is empty."
    assert refusal(7) == (
        "A value of type int cannot be seen; give a path, bytes, a data: URL, a PIL image or an array."
    )


@pytest.mark.parametrize("url", ["http://example.org/cat.png", "HTTPS://example.org/cat.png"])
def test_nothing_is_fetched(url):
    assert refusal(url) == f"{url} is a web address, and nothing is fetched; download it and give the file."


def test_broken_data_urls():
    assert refusal("data:image/png;base64") == (
        "data:image/png;base64 is no data: URL; it should look like data:image/png;base64,iVBORw0..."
    )
    assert refusal("data:;base64,abc") == "data:;base64,abc holds broken base64: Incorrect padding."
    assert refusal("data:,") == "data:, is empty."


def test_files_that_are_no_pictures(tmp_path):
    message = "is no picture that can be read; give a PNG, JPEG, GIF, WebP, TIFF, BMP, PPM or AVIF file."
    path = tmp_path / "picture.png"
    path.write_text("Dear Anna, the pictures follow tomorrow.")
    assert refusal(path) == f"{images._short(str(path))} {message}"
    assert refusal(b"%PDF-1.7 ") == f"The file of 9 bytes {message}"
    postscript = saved(noise(), "EPS")  # Pillow would start another program for it
    assert refusal(postscript) == f"The file of {len(postscript)} bytes {message}"


def test_heic_needs_its_plugin(monkeypatch):
    data = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic"
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    assert refusal(data) == (
        f"The file of 24 bytes is a HEIC picture; save it as JPEG or PNG, or run `{add_extra('pictures')}`."
    )
    plugin = types.ModuleType("pillow_heif")
    plugin.register_heif_opener = lambda: monkeypatch.setitem(Image.OPEN, "HEIF", (lambda *_: noise(), None))
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert digest(open_image(data)) == digest(noise())


def test_cut_pictures_are_refused():
    data = saved(noise())
    message = refusal(data[: len(data) // 2])
    assert re.match(r"The file of \d+ bytes is cut short or damaged \(image file is truncated.*\)\.$", message)
    assert refusal(Image.open(io.BytesIO(data[:-900]))).startswith("The PIL image is cut short or damaged (")


def test_too_many_pixels_are_refused_before_decoding():
    huge = bytearray(saved(Image.new("1", (8, 8)), "BMP"))
    for side, message in (
        (9000, "has 9000 x 9000 pixels; at most 50 million are read, so make it smaller."),
        (20000, "has more than 50 million pixels; make it smaller."),
    ):
        huge[18:26] = side.to_bytes(4, "little") * 2
        assert refusal(bytes(huge)) == f"The file of {len(huge)} bytes {message}"
    array = np.broadcast_to(np.uint8(0), (MAX_PIXELS // 10 + 1, 10))
    assert refusal(array) == (
        "The array [5000001, 10] has 10 x 5000001 pixels; at most 50 million are read, so make it smaller."
    )


def test_pictures_without_pixels_are_refused():
    assert refusal(Image.new("RGB", (0, 5))) == "The PIL image has no pixels: its size is 0 x 5."
    assert refusal(np.zeros((3, 0, 3), np.uint8)) == "The array [3, 0, 3] has no pixels: its size is 0 x 3."


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8), np.zeros((4, 4), np.int64), np.zeros((2, 4, 4, 3))]
)
def test_arrays_of_other_shapes_or_types_are_refused(array):
    assert refusal(array) == (
        f"An array {list(array.shape)} of {array.dtype} is no picture; give [height, width] or "
        "[height, width, 3 or 4] of uint8, uint16, or floats from 0 to 1."
    )


def test_values_out_of_range_are_refused():
    assert (
        refusal(np.full((2, 2, 3), 200.0))
        == "The array [2, 2, 3] has the value 200; its values should lie from 0 to 1."
    )
    assert refusal(np.array([[np.nan]])) == "The array [1, 1] has the value nan; its values should lie from 0 to 1."
    assert (
        refusal(Image.new("I", (2, 2), -3)) == "The PIL image has the value -3; its values should lie from 0 to 65535."
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_hide_a_picture():
    data = saved(noise(), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff nonsense")
    assert np.array_equal(np.asarray(open_image(data)), np.asarray(noise()))


def mutations(data, random):
    """Seven ways to damage a file, three of each."""
    for _ in range(3):
        yield data[: random.integers(1, len(data))]
        yield data[random.integers(1, len(data)) :]
        for flips, end in ((1, len(data)), (20, len(data)), (2, 60)):
            bits = bytearray(data)
            for at in random.integers(0, min(end, len(data)), flips):
                bits[at] ^= 1 << random.integers(0, 8)
            yield bytes(bits)
        at, length = random.integers(0, len(data)), random.integers(1, 50)
        yield data[:at] + bytes(length) + data[at + length :]
        yield data[:at] + random.bytes(length) + data[at:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_damaged_pictures_give_a_picture_or_a_sentence(kind, tmp_path):
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    random = np.random.default_rng(len(kind))
    whole = saved(noise(seed=1), kind)
    assert open_image(whole).size == (40, 30)
    refused = 0
    for i, data in enumerate(mutations(whole, random)):
        path = tmp_path / f"{i}.{['png', 'jpg', 'txt', 'heic'][i % 4]}"
        path.write_bytes(data)
        try:
            assert open_image(path).mode == "RGB"
        except PromptError as error:
            refused += 1
            assert "\n" not in str(error) and str(error).endswith(".")
    assert 0 < refused <= 21
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 400e6
