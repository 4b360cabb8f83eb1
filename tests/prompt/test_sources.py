"""Files as programs, terminals and Finder name them, and files that are cut short."""

import io
import unicodedata
import warnings

import pytest
from PIL import Image
from support import engine_of
from test_video import video

from mlx_dgemma.checkpoint.find import DEMO
from mlx_dgemma.errors import PromptError
from mlx_dgemma.prompt.images import open_image
from mlx_dgemma.prompt.paths import local_path
from mlx_dgemma.prompt.video import sample_frames

NAME = "Bildschirmfoto 2026-11-28 um 9.41.07\u202fé (1) 100% #2 it's.png"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / unicodedata.normalize("NFC", NAME)
    Image.new("RGB", (4, 4), (200, 30, 30)).save(path)
    return path


def dropped(path):
    """As Terminal writes a file that is dropped on it."""
    return "".join("\\" + char if char in " ()'#%\u202f" else char for char in str(path))


@pytest.mark.parametrize(
    "written",
    [
        str,
        lambda path: path.as_uri(),
        lambda path: path.as_uri().replace("file:///", "file://localhost/"),
        lambda path: "file://" + str(path).replace("%", "%25"),
        dropped,
        lambda path: dropped(path) + " ",
        lambda path: '"' + str(path) + '"',
        lambda path: "'" + str(path).replace("'", "'\\''") + "'\n",
        lambda path: unicodedata.normalize("NFD", str(path)),
        lambda path: unicodedata.normalize("NFD", path.as_uri()),
    ],
)
def test_a_picture_is_found_however_its_path_is_written(picture, written):
    assert open_image(written(picture)).getpixel((1, 1)) == (200, 30, 30)


def test_a_path_from_home_and_one_that_is_nowhere(picture, monkeypatch):
    monkeypatch.setenv("HOME", str(picture.parent))
    assert local_path(f"~/{picture.name}") == str(picture)
    for nowhere in ("no such file.png", "'open", "a\0b", ""):
        assert local_path(nowhere) == nowhere
    with pytest.raises(PromptError, match=r"^/no such/file\.png does not exist\.$"):
        open_image("file:///no%20such/file.png")


def test_open_files_are_read_from_their_beginning(picture, tmp_path):
    held = io.BytesIO()
    Image.open(picture).save(held, "PNG")  # it stands at its end now
    assert open_image(held).size == (4, 4)
    with picture.open("rb") as file:
        assert open_image(file).size == (4, 4)
    assert len(engine_of(DEMO).prepare("What is it?", images=[held], seed=0).prompt.pictures) == 1
    assert next(sample_frames(io.BytesIO(video(3)))).image.size == (64, 48)
    for wrong, told in (
        (io.StringIO("x"), "The open file gives str; open it in binary mode."),
        (io.BytesIO(), "The file of 0 bytes is empty."),
    ):
        with pytest.raises(PromptError) as caught:
            open_image(wrong)
        assert str(caught.value) == told


def test_videos_by_their_address(tmp_path):
    path = tmp_path / "a b.mp4"
    path.write_bytes(video(3))
    assert len(list(sample_frames(path.as_uri()))) == len(list(sample_frames(dropped(path)))) == 1
    folder = tmp_path / "my frames"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    assert len(list(sample_frames(folder.as_uri()))) == 1


def listed_first(data):
    """The same MP4 file with the list of its frames at its beginning."""
    boxes, at = [], 0
    while at < len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        boxes.append(data[at : at + length])
        at += length
    (moov,) = (box for box in boxes if box[4:8] == b"moov")
    offsets = moov.index(b"stco") + 8
    moved = bytearray(moov)
    for i in range(int.from_bytes(moov[offsets : offsets + 4], "big")):
        place = slice(offsets + 4 * (i + 1), offsets + 4 * (i + 2))
        moved[place] = (int.from_bytes(moov[place], "big") + len(moov)).to_bytes(4, "big")
    return b"".join([boxes[0], bytes(moved), *(box for box in boxes[1:] if box is not moov)])


@pytest.mark.parametrize("share", [60, 80, 95])
def test_a_video_that_is_cut_says_so(share):
    for whole in (listed_first(video(40)), video(40)):
        listed = whole.index(b"moov") < whole.index(b"mdat")
        data = whole[: len(whole) * share // 100]
        if listed:
            with pytest.warns(UserWarning, match=r"^The file of \d+ bytes is cut short: "):
                assert list(sample_frames(data))
        else:
            with pytest.raises(PromptError, match=r"^The file of \d+ bytes is cut short: the list of its frames, "):
                list(sample_frames(data))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(list(sample_frames(whole))) == 4


def test_a_heic_picture_is_read(monkeypatch):
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    held = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(held, "HEIF")
    assert open_image(held.getvalue()).getpixel((9, 9)) == pytest.approx((200, 30, 30), abs=3)


@pytest.mark.skipif("AVIF" not in Image.OPEN and not Image.init(), reason="Pillow without AVIF")
def test_an_avif_picture_is_read_or_told(monkeypatch):
    held = io.BytesIO()
    Image.new("RGB", (64, 48), (200, 30, 30)).save(held, "AVIF")
    assert open_image(held.getvalue()).getpixel((9, 9)) == pytest.approx((200, 30, 30), abs=3)
    monkeypatch.delitem(Image.OPEN, "AVIF")
    with pytest.raises(PromptError, match=r" is an AVIF picture; save it as JPEG or PNG, .*pip install -U pillow\.$"):
        open_image(held.getvalue())
