"""Videos: which frames are taken, their times, and every mistake."""

import io
import struct
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from mlx_dgemma.errors import OptionError, PromptError
from mlx_dgemma.installation import add_extra
from mlx_dgemma.prompt.video import sample_frames, stamp

av = pytest.importorskip("av")


def colour(i):
    """Frame i's colour: far enough from its neighbours to survive the codec."""
    return 20 + i % 10 * 24, 20 + i // 10 % 10 * 24, 20 + i // 100 * 24


def index_of(image):
    """Which frame a picture is, by the colour of its middle."""
    red, green, blue = (round((value - 20) / 24) for value in image.getpixel((image.width // 2, image.height // 2)))
    return red + 10 * green + 100 * blue


def video(frames, rate=10, kind="mp4", codec="mpeg4", times=None, size=(64, 48), group=12, **options):
    """The bytes of a video of single-coloured frames; `times` in milliseconds where the rate is not constant."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = *size, "yuv420p", group
        stream.bit_rate = 4_000_000
        for i in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, colour(i)))
            if times:
                frame.pts, frame.time_base = times[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def song(cover=False):
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 8000
        if cover:
            picture = container.add_stream("mjpeg", rate=1)
            picture.width, picture.height, picture.pix_fmt = 32, 32, "yuvj420p"
            picture.disposition = av.stream.Disposition.attached_pic.value
            container.mux(picture.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    return file.getvalue()


def taken(source, *options):
    return [(round(frame.seconds, 3), index_of(frame.image)) for frame in sample_frames(source, *options)]


def refusal(source, *options):
    with pytest.raises(PromptError) as caught:
        list(sample_frames(source, *options))
    return str(caught.value)


@pytest.mark.parametrize("kind", ["mp4", "mov", "matroska", "avi", "mpegts"])
def test_a_file_is_sampled_evenly(kind, tmp_path):
    data = video(45, kind=kind)
    path = tmp_path / "video"
    path.write_bytes(data)
    assert taken(path) == taken(str(path)) == taken(data) == [(0, 0), (1.1, 11), (2.2, 22), (3.3, 33)]
    for frames, expected in ((1, [0]), (4, [0, 11, 22, 33]), (7, [i * 45 // 7 for i in range(7)])):
        assert taken(data, 100.0, frames) == [(i / 10, i) for i in expected]
    assert taken(data, 10) == [(i * 45 // 32 / 10, i * 45 // 32) for i in range(32)]
    assert taken(data, 0.01) == [(0, 0)]


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi", "mpegts"])
def test_a_long_file_is_sampled_by_jumping(kind, monkeypatch):
    data = video(900, rate=5, kind=kind, group=25)  # three minutes
    expected = [(i * 900 // 8 / 5, i * 900 // 8) for i in range(8)]
    assert taken(data, 1, 8) == expected
    monkeypatch.setattr("mlx_dgemma.prompt.video._SEEK", 10**6)
    assert taken(data, 1, 8) == expected


def test_a_frame_that_stays_on_show_comes_once():
    data = video(5, times=[0, 5000, 5500, 30_000, 60_000], rate=1000, kind="matroska", group=1)
    assert taken(data, 1, 100) == [(0, 0), (5, 1), (5.5, 2), (30, 3)]
    assert taken(data, 1, 3) == [(0, 0), (5.5, 2), (30, 3)]


def test_a_streamed_recording_that_does_not_say_its_length():
    data = video(30, kind="matroska", live="1")
    with av.open(io.BytesIO(data)) as container:
        assert not container.duration
    assert taken(data) == [(0, 0), (1, 10), (2, 20)]


def test_a_file_that_ends_early_is_reported():
    data = video(100, kind="matroska")
    with pytest.warns(
        UserWarning, match=r"^The file of \d+ bytes is cut short: it ends after \d\.\d of 10\.0 seconds\.$"
    ):
        times = [seconds for seconds, _ in taken(data[: len(data) * 55 // 100])]
    assert 3 < len(times) < 9 and times[:-1] == list(range(len(times) - 1)) and times[-2] < times[-1]


def test_rotation_is_honoured():
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        picture = Image.new("RGB", (64, 48), (255, 255, 255))
        picture.paste((0, 0, 0), (0, 0, 64, 16))
        container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    data = bytearray(file.getvalue())
    matrix = data.index(b"tkhd") + 44
    data[matrix : matrix + 36] = struct.pack(
        ">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30
    )  # a phone held upright
    (frame,) = sample_frames(bytes(data))
    assert frame.image.size == (48, 64)
    right, left = frame.image.getpixel((40, 32)), frame.image.getpixel((8, 32))
    assert max(right) < 60 and min(left) > 200  # what was above is at the right


def test_an_animated_picture_is_a_video():
    file = io.BytesIO()
    frames = [Image.new("RGB", (32, 32), colour(i)) for i in range(10)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=500)
    assert taken(file.getvalue()) == [(float(i), 2 * i) for i in range(5)]


def test_folders_come_in_natural_order_and_lists_as_they_are(tmp_path):
    pictures = [Image.new("RGB", (8, 8), colour(i)) for i in range(12)]
    for i, picture in enumerate(pictures):
        picture.save(tmp_path / f"frame{i}.png")
    (tmp_path / ".DS_Store").write_text("hidden")
    paths = [tmp_path / f"frame{i}.png" for i in range(12)]
    for source in (tmp_path, str(tmp_path), pictures, tuple(paths), [str(path) for path in paths]):
        assert taken(source) == [(i, i) for i in range(12)]
        assert taken(source, 2.0) == [(i / 2, i) for i in range(12)]
        assert taken(source, 4, 5) == [(i / 4, i) for i in (0, 2, 4, 7, 9)]
    (tmp_path / "notes.txt").write_text("not a frame")
    assert "notes.txt is no picture that can be read; give a PNG, " in refusal(tmp_path)


def test_only_chosen_pictures_are_opened():
    assert taken([Image.new("RGB", (8, 8), colour(0)), "nowhere.png"], 1, 1) == [(0, 0)]


def test_stamps():
    assert [stamp(s) for s in (0, 0.999, 59.99, 60, 754.2, 3600, 6000)] == [
        "00:00", "00:00", "00:59", "01:00", "12:34", "60:00", "100:00",
    ]  # fmt: skip


def test_options_out_of_bounds():
    for fps in (0, -1, float("nan"), float("inf"), "1", True):
        with pytest.raises(OptionError) as caught:
            sample_frames("video.mp4", fps)
        assert str(caught.value) == f"fps is {fps!r}; it should be a number of frames a second above 0."
    for frames in (0, 1.5, True):
        with pytest.raises(OptionError) as caught:
            sample_frames("video.mp4", 1.0, frames)
        assert str(caught.value) == f"max_frames is {frames!r}; it should be a whole number of at least 1."


def test_sources_that_are_no_videos(tmp_path):
    assert refusal([]) == "The video has no frames; give at least one picture."
    assert refusal(tmp_path) == f"The folder {tmp_path} is empty; put the frames of a video into it."
    assert refusal("nowhere.mp4") == "nowhere.mp4 does not exist."
    assert refusal("https://example.org/a.mp4") == (
        "https://example.org/a.mp4 is a web address, and nothing is fetched; download it and give the file."
    )
    for data in (song(), song(cover=True)):
        message = "has sound and no pictures; transcribe it and give the text."
        assert refusal(data) == f"The file of {len(data)} bytes {message}"
    assert refusal(b"Dear Anna, the video follows tomorrow.") == (
        "The file of 38 bytes is no video that can be read, or is damaged (Invalid data found when processing input)."
    )


def test_a_playlist_reads_no_other_file(tmp_path):
    (tmp_path / "part.ts").write_bytes(video(10, kind="mpegts"))
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\npart.ts\n#EXT-X-ENDLIST\n")
    assert refusal(playlist).endswith("is no video that can be read, or is damaged (Invalid argument).")


def test_frames_without_times_are_refused():
    data = video(10, kind="h264", codec="libx264")  # a raw stream
    assert refusal(data) == (
        f"The file of {len(data)} bytes does not say when its frames are shown; put it into an MP4 or MKV file."
    )


def test_a_missing_decoder_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert refusal(b"any") == f"Video files need a decoder; run `{add_extra('video')}`."
    assert taken([Image.new("RGB", (8, 8), colour(3))]) == [(0, 3)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["mp4", "matroska", "mpegts"])
def test_damaged_videos_give_frames_or_a_sentence(kind):
    whole, random, refused = video(20, kind=kind), np.random.default_rng(0), 0
    for i in range(25):
        data = bytearray(whole)
        for at in random.integers(0, len(data), 1 + i * 4):
            data[at] ^= 1 << random.integers(0, 8)
        if i % 4 == 0:
            del data[random.integers(1, len(data)) :]
        try:
            assert len(list(sample_frames(bytes(data), 5))) <= 32
        except PromptError as error:
            refused += 1
            assert str(error).endswith(".")
    assert refused > 0
