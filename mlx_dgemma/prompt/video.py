"""Videos to frames: a file, a folder of pictures or a list of them, sampled evenly in time.

With n frames wanted of a video's length, frame i is the one on show at i / n of it. At a constant rate these are
the frames that Transformers chooses, and their times are those it writes. Only what is chosen is kept.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image

from ..errors import OptionError, PromptError
from ..installation import add_extra
from .images import MAX_PIXELS, open_file, open_image
from .paths import local_path

_JITTER = Fraction(1, 1000)  # seconds; some containers round times to a millisecond
_SEEK = 10  # seconds; a jump shorter than the usual distance of key frames is not worth it
_FORMATS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,asf,flv,ogg,mxf,nut,ivf,h264,hevc,m4v,mpegvideo,"
    "yuv4mpegpipe,gif,apng,mp3,wav,flac,aac"  # the last four only to say that sound must be transcribed
)
_TIMELESS = "{name} does not say when its frames are shown; put it into an MP4 or MKV file."


@dataclass(frozen=True)
class Frame:
    """One frame: its time in seconds from the beginning, and its picture (RGB, upright)."""

    seconds: float
    image: Image.Image


def stamp(seconds: float) -> str:
    """The time as the prompt writes it, mm:ss, rounded down; minutes go on beyond an hour."""
    return f"{int(seconds // 60):02d}:{int(seconds % 60):02d}"


def sample_frames(source: Any, fps: float = 1.0, max_frames: int = 32) -> Iterator[Frame]:
    """Frames of a video, one at a time so that memory stays that of one frame.

    Args:
        source: a video file (a path, its bytes or a `data:` URL), a folder of pictures (in natural order of
            their names), or a sequence of whatever `open_image` takes.
        fps: frames a second to take from a file; of a folder or a sequence, how far apart its frames are.
        max_frames: the most frames; a longer video is sampled evenly.

    Raises:
        OptionError: fps or max_frames is out of bounds.
        PromptError: the source cannot be read, holds no frames, or no decoder is installed.
    """
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < math.inf:
        raise OptionError(f"fps is {fps!r}; it should be a number of frames a second above 0.")
    if isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1:
        raise OptionError(f"max_frames is {max_frames!r}; it should be a whole number of at least 1.")
    if isinstance(source, str):
        source = local_path(source)
    if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):
        source = _files(Path(source))
    if isinstance(source, Sequence) and not isinstance(source, (str, bytes, bytearray, memoryview)):
        return _from_pictures(source, fps, max_frames)
    return _from_file(source, fps, max_frames)


def _files(folder: Path) -> list[Path]:
    def natural(path: Path) -> list[tuple[int, str]]:
        return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]

    files = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=natural)
    if not files:
        raise PromptError(f"The folder {folder} is empty; put the frames of a video into it.")
    return files


def _from_pictures(pictures: Sequence[Any], fps: float, max_frames: int) -> Iterator[Frame]:
    if not pictures:
        raise PromptError("The video has no frames; give at least one picture.")
    count = min(len(pictures), max_frames)
    chosen = [i * len(pictures) // count for i in range(count)]
    return (Frame(i / fps, open_image(pictures[i])) for i in chosen)


def _from_file(source: Any, fps: float, max_frames: int) -> Iterator[Frame]:
    try:
        import av
    except ImportError:
        raise PromptError(f"Video files need a decoder; run `{add_extra('video')}`.") from None
    name, file = open_file(source)
    with file:
        cut, listed = _boxes(file)
        if cut and not listed:
            raise PromptError(
                f"{name} is cut short: the list of its frames, which stands at its end, is missing; copy it again."
            )
        try:
            # A file object and no playlist formats: nothing but the given file is ever read.
            with av.open(file, options={"format_whitelist": _FORMATS}) as container:
                stream = _picture_stream(name, container)
                length = _length(name, container, stream)
                if cut:
                    warnings.warn(f"{name} is cut short: its end is missing.", stacklevel=2)
                count = min(max_frames, max(1, int(float(length) * fps)))
                yield from _decode(name, container, stream, [i * length / count for i in range(count)], length)
        except (av.FFmpegError, ValueError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise PromptError(f"{name} is no video that can be read, or is damaged ({reason}).") from None


def _boxes(file: BinaryIO) -> tuple[bool, bool]:
    """Of an MP4 or QuickTime file: whether its last box reaches beyond its end, and whether it lists its frames."""
    size, at, listed = file.seek(0, os.SEEK_END), 0, False
    head = b"-"
    while at < size and head:
        file.seek(at)
        head = file.read(16)
        kind, length = head[4:8], int.from_bytes(head[:4], "big")
        if at == 0 and kind not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            break
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        at = size if length == 0 else at + max(length, 8)
        listed = listed or (kind == b"moov" and at <= size)
    file.seek(0)
    return at > size, listed


def _picture_stream(name: str, container: Any) -> Any:
    """The first stream of moving pictures: a song's cover is none."""
    from av.stream import Disposition

    moving = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not moving:
        if container.streams.audio:
            raise PromptError(f"{name} has sound and no pictures; transcribe it and give the text.")
        raise PromptError(f"{name} has no video in it.")
    if moving[0].codec_context is None:
        raise PromptError(f"{name} is coded in a way that cannot be decoded; convert it to H.264 in an MP4 file.")
    width, height = moving[0].width, moving[0].height
    if width * height > MAX_PIXELS:
        raise PromptError(
            f"{name} has frames of {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million are read."
        )
    moving[0].thread_type = "AUTO"
    return moving[0]


def _length(name: str, container: Any, stream: Any) -> Fraction:
    """Seconds. A recording that was streamed does not say: its packets are read through, undecoded."""
    if stream.duration:
        return stream.duration * stream.time_base
    if container.duration:
        return Fraction(container.duration, 1_000_000)
    ends = [packet.pts + (packet.duration or 0) for packet in container.demux(stream) if packet.pts is not None]
    if not ends:
        raise PromptError(_TIMELESS.format(name=name))
    container.seek(0)
    return (max(ends) - (stream.start_time or 0)) * stream.time_base


def _decode(name: str, container: Any, stream: Any, wanted: list[Fraction], length: Fraction) -> Iterator[Frame]:
    """The frames on show at the wanted times (ascending, in seconds); one that stays on show comes once."""
    import av

    start = stream.start_time or 0

    def time(frame: Any) -> Fraction:
        if frame.pts is None:
            raise PromptError(_TIMELESS.format(name=name))
        return (frame.pts - start) * frame.time_base

    def jump(to: Fraction) -> Iterator[Any]:
        with contextlib.suppress(av.FFmpegError):  # what cannot jump is decoded through
            container.seek(start + int(max(to, 0) / stream.time_base), stream=stream)
        return container.decode(stream)

    frames = container.decode(stream)
    shown: Any = None
    coming: Any = next(frames, None)
    if coming is None:
        raise PromptError(f"{name} has no frame that can be decoded.")
    given: Any = None
    for at in wanted:
        if coming is not None and at - time(coming) > _SEEK:
            for early in (0, _SEEK):  # some containers land on the key frame after
                frames = jump(at - early)
                shown, coming = None, next(frames, None)
                if coming is not None and time(coming) <= at:
                    break
        while coming is not None and time(coming) <= at + _JITTER:
            shown, coming = coming, next(frames, None)
        frame = shown or coming  # nothing is on show yet when the first frame comes late
        if frame is None:
            break
        if given is None or time(frame) > time(given):
            given = frame
            yield Frame(float(time(frame)), frame.to_image().rotate(frame.rotation, expand=True))
    end = time(given) + (given.duration or 0) * stream.time_base
    if coming is None and end + 1 < length:
        warnings.warn(
            f"{name} is cut short: it ends after {float(end):.1f} of {float(length):.1f} seconds.", stacklevel=2
        )
