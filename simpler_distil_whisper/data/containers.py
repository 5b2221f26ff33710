"""What the structure of an audio file tells and libsndfile does not check.

Files that were joined, cut off, or written by a recorder that never came to write the size. Owns
the walk over chunks (WAV, RF64, W64, AIFF, CAF), pages (Ogg), frames (MP3) and headers (AU). It
decodes nothing.
"""

import errno
import itertools
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

from simpler_distil_whisper.data.pauses import OGG_HEADER, OPUS_BYTES, OpusPages

FEW_BYTES = 512  # behind the audio; nobody misses them
MOST_CHUNKS = 100_000
MOST_RECORDINGS = 1_000  # of one file
# What stands for the size where it is not known yet, as in a pipe, is about 2 or 4 gigabytes.
UNKNOWN_SIZE = 2**31 - 2**16
UNKNOWN_LONG_SIZE = 2**62  # where lengths have 64 bits
IN_DS64 = 2**32 - 1  # the length of an RF64's audio, which stands in its chunk "ds64"
OGG_FIRST_PAGE = 2
BLOCK_BYTES = 2**20  # searched at once
SEARCHED_BYTES = 2**27  # at most, where a structure does not tell its end
FLAC_BUFFER_BYTES = 2**14  # read ahead by a decoder, and more
TAG_BYTES = 2**16  # behind an MP3, and before another recording
ZERO_BYTES = 2**24  # so many at the end are left out, unless a header counts them
MOST_ZERO_BYTES = 2**32  # looked through, where the file system does not tell of them
CHAINED_FRAMES = 4  # by which frames are told from other bytes
UNDERSTATED = "its header counts less than it holds, all of which is used"
ZEROS = "the zeros at its end, which its header does not count, are left out"
SEVERAL_CHUNKS = "it has several chunks of audio, of which only the first one is used"

FLAC_START = b"fLaC\x00\x00\x00\x22"  # with the header of the block that is always the first
EBML_START = b"\x1a\x45\xdf\xa3"  # of Matroska and WebM
BOX_NAME = b"ftyp"  # of the first box of an MP4, behind its length
# How recordings begin: what is searched for, and what has to stand there.
SIGNATURES = {
    b"RIFF": rb"RIFF.{4}(WAVE|AVI )",
    b"RIFX": rb"RIFX.{4}WAVE",
    b"RF64": rb"RF64.{4}WAVE",
    b"BW64": rb"BW64.{4}WAVE",
    b"riff\x2e\x91\xcf\x11": rb"riff",
    b"FORM": rb"FORM.{4}AIF[FC]",
    b"caff\x00\x01\x00\x00": rb"caff",
    b".snd\x00\x00": rb".{4}\x00\x00.{6}\x00\x00\x00[\x01-\x1b]",
    b"dns.": rb".{6}\x00\x00.{4}[\x01-\x1b]\x00\x00\x00",
    FLAC_START: rb"fLaC",
    b"OggS\x00\x02": rb".{6}\x00{8}",
    BOX_NAME: rb"\x00\x00\x00[\x0c-\x80]ftyp",
    EBML_START: rb".{4}([\x80-\xff]|\x01\x00).{0,6}\x42\x86",
    b"\x30\x26\xb2\x75\x8e\x66\xcf\x11": rb"\x30",  # WMA
    b"#!AMR": rb"#!AMR(-WB)?\n",
    b"wvpk": rb"wvpk.{4}[\x02-\x10]\x04.{6}\x00{4}",  # the block of its first sample
}
SIGNATURE_BYTES = 32

# Of MPEG audio, layer III: kilobits per second by index; those of MPEG 1, then of 2 and 2.5.
MP3_BITRATES = (
    (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
)
FRAME_HEADER_BYTES = 7
ADTS_RATES = (  # of AAC, by index
    *(96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050),
    *(16_000, 12_000, 11_025, 8_000, 7_350),
)
MP3_RATES = {3: (44_100, 48_000, 32_000), 2: (22_050, 24_000, 16_000), 0: (11_025, 12_000, 8_000)}

# Reads the header of a frame: its length in bytes and in seconds; None: it is none.
FrameOf = Callable[[bytes], tuple[int, float] | None]


class Chunks(NamedTuple):
    """How the chunks of a kind of file are written.

    Attributes:
        head: how many bytes are before the first chunk.
        header: a chunk's name and length.
        audio: the name of the chunk that holds the audio.
        unknown: from this length on, it stands for one that is not known.
        counted: how many bytes of its own header a length counts.
        alignment: chunks begin at a multiple of it, mostly.
    """

    head: int
    header: struct.Struct
    audio: bytes
    unknown: int = UNKNOWN_SIZE
    counted: int = 0
    alignment: int = 2


CHUNKS = {
    b"RIFF": Chunks(12, struct.Struct("<4sI"), b"data"),
    b"RIFX": Chunks(12, struct.Struct(">4sI"), b"data"),
    b"RF64": Chunks(12, struct.Struct("<4sI"), b"data", UNKNOWN_LONG_SIZE),
    b"BW64": Chunks(12, struct.Struct("<4sI"), b"data", UNKNOWN_LONG_SIZE),
    b"riff": Chunks(40, struct.Struct("<4s12xQ"), b"data", UNKNOWN_LONG_SIZE, 24, 8),  # W64
    b"FORM": Chunks(12, struct.Struct(">4sI"), b"SSND"),
    b"caff": Chunks(8, struct.Struct(">4sQ"), b"data", UNKNOWN_LONG_SIZE),
}
AU_HEADER_BYTES = 24  # at least
AU_LAYOUTS = {b".snd": ">4sIII", b"dns.": "<4sIII"}  # name, length of the header, length, encoding


class Structure(NamedTuple):
    """What the structure of a recording tells; a file holds one, or several that were joined.

    Attributes:
        begin: where it begins in the file.
        end: where it ends.
        following: where the next recording begins; None: this is the last one.
        patch: where another length has to stand than does, and its bytes.
        remark: what is odd about it.
        shortage: how many times what is there the header promises; 1: it promises no more.
        torn: whether it ends in the midst of a page.
        paused: whether the times on the pages of an Opus leave out more than a moment.
        frame_seconds: of an MP3 whose header does not count its bytes, the length of all frames,
            which an encoder's delay and padding belong to.
        frames_promised: whether a header tells how many frames there are.
    """

    begin: int
    end: int
    following: int | None = None
    patch: tuple[int, bytes] | None = None
    remark: str | None = None
    shortage: float = 1.0
    torn: bool = False
    paused: bool = False
    frame_seconds: float | None = None
    frames_promised: bool = True


class _Length(NamedTuple):
    """The length of the audio in a header.

    Attributes:
        bytes_: how much audio it tells.
        place: where it stands.
        layout: how it is written.
        unknown: from this length on, it stands for one that is not known.
        counted: how many bytes of a header it counts as well.
    """

    bytes_: int
    place: int
    layout: struct.Struct
    unknown: int
    counted: int = 0

    def patch(self, length: int) -> tuple[int, bytes]:
        """Return where to write which bytes, so that the header tells this length."""
        most = 2 ** (8 * self.layout.size) - 1
        return self.place, self.layout.pack(min(length + self.counted, most))


def read_structures(file: BinaryIO, *, thorough: bool) -> list[Structure]:
    """Return what the structure of each recording in a file tells; usually there is one.

    Args:
        file: the file.
        thorough: whether all of it may be read, without which recordings behind those that do not
            tell where they end go unnoticed.
    """
    size = file.seek(0, os.SEEK_END)
    structures = [_read_structure(file, 0, size, thorough=thorough)]
    while (begin := structures[-1].following) and len(structures) <= MOST_RECORDINGS:
        structures.append(_read_structure(file, begin, size, thorough=thorough))
    return structures


def _read_structure(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of the recording that begins there."""
    start = _after_id3(file, begin)
    beginning = _read(file, start, 12)
    if beginning[:4] in CHUNKS:
        return _read_chunks(file, start, size, thorough=thorough)
    if beginning[:4] in AU_LAYOUTS:
        return _read_au(file, start, size, thorough=thorough)
    size = max(begin, _end_of_content(file, size))
    if beginning[:4] == b"OggS":
        return _read_pages(file, start, size)
    if beginning[4:8] == BOX_NAME:
        return _read_boxes(file, start, size)
    if beginning[:4] == EBML_START:
        return _read_ebml(file, start, size, thorough=thorough)
    if beginning[:4] == b"fLaC":
        names = (FLAC_START,)
        return _searched(file, begin, start + 4, size, names if thorough else ())
    if start > begin or beginning[:1] == b"\xff":
        return _read_frames(file, begin, size)
    return _searched(file, begin, begin + 12, size, tuple(SIGNATURES) if thorough else ())


def _read(file: BinaryIO, offset: int, count: int) -> bytes:
    file.seek(offset)
    return file.read(count)


def _positions(file: BinaryIO, pattern: bytes, start: int, end: int) -> Iterator[int]:
    """Yield where a pattern begins in a part of a file."""
    overlap = len(pattern) - 1
    while start < end:
        block = _read(file, start, min(BLOCK_BYTES, end + overlap - start))
        if len(block) <= overlap:
            return
        place = block.find(pattern)
        while place >= 0:
            yield start + place
            place = block.find(pattern, place + 1)
        start += len(block) - overlap


def _next_recording(
    file: BinaryIO, start: int, end: int, names: Iterable[bytes] = SIGNATURES
) -> int | None:
    """Return where another recording begins in a part of a file, by its signature."""
    first: int | None = None
    for name in names:
        before = 4 if name == BOX_NAME else 0
        last = end if first is None else first
        for position in _positions(file, name, start + before, last + before):
            content = _read(file, position - before, SIGNATURE_BYTES)
            if re.match(SIGNATURES[name], content, re.DOTALL):
                first = position - before
                break
    return first


def _begins(file: BinaryIO, position: int) -> bool:
    """Return whether a recording begins there."""
    start = _after_id3(file, position)
    if _next_recording(file, start, start + 1) == start:
        return True
    return any(_is_chain(file, start, kind) for kind in (_mp3_frame, _adts_frame))


def recording_behind(file: BinaryIO, position: int) -> int | None:
    """Return where a recording begins behind a FLAC, which a decoder has read up to there."""
    start = max(1, position - FLAC_BUFFER_BYTES)
    if following := _next_recording(file, start, start + SEARCHED_BYTES):
        return following
    places = _positions(file, b"\xff", start, position + TAG_BYTES)
    return next((place for place in places if _begins(file, place)), None)


def _searched(
    file: BinaryIO, begin: int, start: int, size: int, names: Iterable[bytes]
) -> Structure:
    """Return the structure of a recording that ends where another one is."""
    end = size if FLAC_START in names else min(size, start + SEARCHED_BYTES)
    following = _next_recording(file, start, end, names)
    return Structure(begin, following or size, following)


def _ended(file: BinaryIO, begin: int, end: int, size: int) -> Structure:
    """Return the structure of a recording that ends there, with another behind it or none."""
    follows = begin < end < size and _begins(file, end)
    return Structure(begin, end, end) if follows else Structure(begin, size)


def _end_of_written(file: BinaryIO, size: int) -> int:
    """Return where the last hole of a sparse file begins, if it reaches to the end."""
    if not hasattr(os, "SEEK_HOLE"):
        return size
    descriptor, end = file.fileno(), 0
    position = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        while end < size:
            end = os.lseek(descriptor, end, os.SEEK_HOLE)
            if end < size:
                end = os.lseek(descriptor, end, os.SEEK_DATA)
    except OSError as error:
        return end if error.errno == errno.ENXIO else size  # no data behind the hole
    finally:
        os.lseek(descriptor, position, os.SEEK_SET)
    return size


def _end_of_content(file: BinaryIO, size: int) -> int:
    """Return where a file ends without the zeros at its end, if these are very many."""
    written = end = _end_of_written(file, size)
    while end > 0 and written - end < MOST_ZERO_BYTES:
        block = _read(file, max(0, end - BLOCK_BYTES), min(end, BLOCK_BYTES))
        if rest := block.rstrip(b"\0"):
            end -= len(block) - len(rest)
            break
        end -= len(block)
    return end if size - end > ZERO_BYTES else size


def _read_chunks(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of a file of chunks."""
    kind = CHUNKS[_read(file, begin, 4)]
    header = kind.header
    position, long_length = begin + kind.head, (IN_DS64, 0)
    audio: tuple[int, _Length] | None = None
    remark: str | None = None
    for _ in range(MOST_CHUNKS):
        if audio and _begins(file, position):
            return Structure(begin, position, position, remark=remark)
        content = _read(file, position, header.size)
        if len(content) < header.size:
            break
        name, length = header.unpack(content)
        start, length = position + header.size, max(length - kind.counted, 0)
        if name == b"ds64":
            long_length = int.from_bytes(_read(file, start + 8, 8), "little"), start + 8
        elif name == kind.audio and not audio:
            # Of each kind, the length stands at the end of the header.
            layout = struct.Struct(header.format[0] + header.format[-1])
            written = _Length(length, start - layout.size, layout, kind.unknown, kind.counted)
            if length == IN_DS64 and long_length[1]:
                written = _Length(*long_length, struct.Struct("<Q"), kind.unknown)
            length, audio = written.bytes_, (start, written)
            if length > size - start or length == 0 < size - start - FEW_BYTES:
                return _miscounted(file, begin, *audio, size, thorough=thorough)
        elif name == kind.audio and length:
            remark = SEVERAL_CHUNKS
        elif audio and not _is_name(name):
            if size - position > FEW_BYTES:
                return _miscounted(file, begin, *audio, size, thorough=thorough)
            break
        end = min(start + length, size)
        position = _next_chunk(file, end, kind.alignment)
    return Structure(begin, size, remark=remark)


def _miscounted(
    file: BinaryIO, begin: int, start: int, length: _Length, size: int, *, thorough: bool
) -> Structure:
    """Return the structure of a recording whose audio is longer or shorter than its header tells.

    Args:
        file: the file.
        begin: of the recording.
        start: of its audio.
        length: by the header.
        size: of the file.
        thorough: as in `read_structures`.
    """
    magic = _read(file, begin, 4)
    names = [name for name in SIGNATURES if name.startswith(magic)] if thorough else []
    is_known = length.bytes_ < length.unknown
    searched_end = min(_end_of_content(file, size), start + SEARCHED_BYTES)
    following = _next_recording(file, start, searched_end, names)
    end = following or size
    if is_known and length.bytes_ > end - start:
        shortage = length.bytes_ / (end - start) if end > start else 1.0
        return Structure(begin, end, following, shortage=shortage)
    counted_end = start + length.bytes_ if is_known else start
    content_end = max(counted_end, _end_of_content(file, end))
    remark = ZEROS if content_end < end else UNDERSTATED if is_known else None
    patch = length.patch(content_end - start)
    return Structure(begin, content_end, following, patch, remark)


def _next_chunk(file: BinaryIO, end: int, alignment: int) -> int:
    """Return where the chunk after one that ends there begins."""
    is_there = _is_name(_read(file, end, 4)) or _begins(file, end)
    return end if is_there else end + -end % alignment


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= letter < 127 for letter in name)


def _read_au(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of an AU file, which has one header and its audio."""
    content = _read(file, begin, 16).ljust(16, b"\0")
    layout = AU_LAYOUTS[content[:4]]
    _, offset, count, _ = struct.unpack(layout, content)
    start = begin + max(offset, AU_HEADER_BYTES)
    length = _Length(count, begin + 8, struct.Struct(layout[0] + "I"), UNKNOWN_SIZE)
    end = start + count
    if count and end <= size and (size - end <= FEW_BYTES or _begins(file, end)):
        return _ended(file, begin, end, size)
    return _miscounted(file, begin, start, length, size, thorough=thorough)


def _read_pages(file: BinaryIO, begin: int, size: int) -> Structure:
    """Return the structure of an Ogg stream; another one that is chained to it follows it."""
    position, among_first, opus = begin, True, OpusPages()
    while position < size:
        page = _read(file, position, OGG_HEADER.size + 255 + OPUS_BYTES)
        if page[:4] != b"OggS":
            if _begins(file, position):
                return Structure(begin, position, position)
            position = next(_positions(file, b"OggS", position + 1, size), size)
            continue
        if len(page) < OGG_HEADER.size:
            position = size + 1
            break
        is_first = bool(page[5] & OGG_FIRST_PAGE)
        if is_first and not among_first:
            return Structure(begin, position, position, paused=opus.paused)
        among_first = is_first
        lengths = page[OGG_HEADER.size : OGG_HEADER.size + page[26]]
        opus.add(page, lengths)
        position += OGG_HEADER.size + page[26] + sum(lengths)
    return Structure(begin, size, torn=position > size, paused=opus.paused)


def _read_boxes(file: BinaryIO, begin: int, size: int) -> Structure:
    """Return the structure of an MP4, whose boxes begin with their length and their name."""
    position = begin
    for _ in range(MOST_CHUNKS):
        head = _read(file, position, 16)
        length = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if len(head) < 8 or length < 8 or (position > begin and _begins(file, position)):
            break
        position += length
    return _ended(file, begin, position, size)


def _read_ebml(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of a Matroska or WebM, which is a header and a segment."""
    position = begin
    for _ in range(2):
        head = _read(file, position, 12)
        if len(head) < 12 or not head[4]:
            break
        width = 9 - head[4].bit_length()
        unknown = 2 ** (7 * width) - 1
        length = int.from_bytes(head[4 : 4 + width], "big") & unknown
        if length == unknown:  # of what a browser records; FLAC's beginning may stand in it
            names = [name for name in SIGNATURES if name != FLAC_START] if thorough else []
            return _searched(file, begin, position + 12, size, names)
        position += 4 + width + length
    return _ended(file, begin, position, size)


def _read_frames(file: BinaryIO, begin: int, size: int) -> Structure:
    """Return the structure of an MP3 or AAC: frames, and tags before, between or behind them."""
    start = _after_id3(file, begin)
    frame_of = _adts_frame if _adts_frame(_read(file, start, FRAME_HEADER_BYTES)) else _mp3_frame
    plain = Structure(begin, size)
    first = next(_frames(file, start, size, frame_of), None)
    if first is None:
        return plain
    counted = None if frame_of is _adts_frame else _counted_bytes(_read(file, first[0], 256))
    if counted and abs(counted - (size - first[0])) < FEW_BYTES:
        return plain
    total, end = 0.0, first[0]
    for position, length, seconds in _frames(file, first[0], size, frame_of):
        if following := _joint(file, end, position):
            break
        if counted is None or position > first[0]:  # the header's own frame is no audio
            total += seconds
        end = position + length
    else:
        following = _joint(file, end, size)
    if following and counted and abs(counted - (following - first[0])) < FEW_BYTES:
        return Structure(begin, following, following)
    return Structure(
        begin,
        following or size,
        following,
        frame_seconds=total if frame_of is _mp3_frame else None,
        frames_promised=counted is not None,
    )


def _joint(file: BinaryIO, end: int, position: int) -> int | None:
    """Return where another recording begins between two frames, or behind the last one.

    MP3s without a tag between them are one to every decoder.
    """
    if position <= end:
        return None
    if following := _next_recording(file, end, min(position, end + TAG_BYTES)):
        return following
    has_header = _counted_bytes(_read(file, position, 48)) is not None
    return end if has_header or (position > end + FEW_BYTES and _begins(file, end)) else None


def _after_id3(file: BinaryIO, position: int) -> int:
    head = _read(file, position, 10)
    if head[:3] != b"ID3" or len(head) < 10:
        return position
    shifted = (byte << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=True))
    return position + 10 + sum(shifted)


def _counted_bytes(frame: bytes) -> int | None:
    """Return how many bytes the header in an MP3's first frame counts; 0: not told, None: none."""
    place = max(frame.find(b"Xing"), frame.find(b"Info"))
    if place < 0:
        return 0 if b"VBRI" in frame else None
    flags = frame[place + 7]
    if flags & 3 != 3:
        return 0
    return int.from_bytes(frame[place + 12 : place + 16], "big")


def _chain(file: BinaryIO, position: int, frame_of: FrameOf) -> Iterator[tuple[int, int, float]]:
    """Yield offset, length in bytes and in seconds of frames, one directly behind the other."""
    while frame := frame_of(_read(file, position, FRAME_HEADER_BYTES)):
        yield position, *frame
        position += frame[0]


def _is_chain(
    file: BinaryIO, position: int, frame_of: FrameOf, frames: int = CHAINED_FRAMES
) -> bool:
    return len(list(itertools.islice(_chain(file, position, frame_of), frames))) == frames


def _frames(
    file: BinaryIO, position: int, size: int, frame_of: FrameOf
) -> Iterator[tuple[int, int, float]]:
    """Yield the frames of a file as `_chain` does; what is no frame is skipped."""
    while True:
        for frame in _chain(file, position, frame_of):
            yield frame
            position = frame[0] + frame[1]
        position = _after_id3(file, position)
        for place in _positions(file, b"\xff", position, min(size, position + SEARCHED_BYTES)):
            if _is_chain(file, place, frame_of, 2):
                position = place
                break
        else:
            return


def _mp3_frame(header: bytes) -> tuple[int, float] | None:
    """Return a frame's length in bytes and in seconds; None if this is no header of layer III."""
    if len(header) < 4:
        return None
    version, bitrate, rate = header[1] >> 3 & 3, header[2] >> 4, header[2] >> 2 & 3
    if header[0] != 255 or header[1] & 0xE6 != 0xE2 or version == 1 or rate == 3:
        return None
    if not 0 < bitrate < 15:
        return None
    hertz, samples = MP3_RATES[version][rate], 1152 if version == 3 else 576
    kilobits = MP3_BITRATES[0 if version == 3 else 1][bitrate]
    return samples * kilobits * 125 // hertz + (header[2] >> 1 & 1), samples / hertz


def _adts_frame(header: bytes) -> tuple[int, float] | None:
    """Return a frame's length in bytes and in seconds; None if this is no header of AAC."""
    if len(header) < FRAME_HEADER_BYTES or header[0] != 255 or header[1] & 0xF6 != 0xF0:
        return None
    rate = header[2] >> 2 & 15
    length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
    if rate >= len(ADTS_RATES) or length < FRAME_HEADER_BYTES:
        return None
    return length, 1024 / ADTS_RATES[rate]
