"""What the structure of an audio file tells and libsndfile does not check.

Files that were joined, cut off, or written by a recorder that never came to write the size. Owns
the walk over chunks (WAV, RF64, W64, AIFF, CAF), pages (Ogg), boxes (MP4) and headers (AU); how
recordings begin is for `signatures`, the frames of MP3 and AAC for `frames`. It decodes nothing.
"""

import os
import struct
from collections.abc import Iterable
from typing import BinaryIO, NamedTuple

from simpler_distil_whisper.data.byte_search import (
    SEARCHED_BYTES,
    end_of_content,
    positions_of,
    read_at,
)
from simpler_distil_whisper.data.frames import (
    FRAME_HEADER_BYTES,
    adts_frame,
    after_id3,
    counted_bytes,
    frames_of,
    mp3_frame,
)
from simpler_distil_whisper.data.pauses import OGG_HEADER, OPUS_BYTES, OpusPages
from simpler_distil_whisper.data.signatures import (
    BOX_NAME,
    EBML_START,
    FLAC_START,
    SIGNATURES,
    TAG_BYTES,
    next_recording,
    recording_begins,
)

FEW_BYTES = 512  # behind the audio; nobody misses them
MOST_CHUNKS = 100_000
MOST_RECORDINGS = 1_000  # of one file
# What stands for the size where it is not known yet, as in a pipe, is about 2 or 4 gigabytes.
UNKNOWN_SIZE = 2**31 - 2**16
UNKNOWN_LONG_SIZE = 2**62  # where lengths have 64 bits
IN_DS64 = 2**32 - 1  # the length of an RF64's audio, which stands in its chunk "ds64"
OGG_FIRST_PAGE = 2
UNDERSTATED = "its header counts less than it holds, all of which is used"
ZEROS = "the zeros at its end, which its header does not count, are left out"
SEVERAL_CHUNKS = "it has several chunks of audio, of which only the first one is used"


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
        lacks_index: whether it is an MP4 that ends before its index does.
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
    lacks_index: bool = False
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
    start = after_id3(file, begin)
    beginning = read_at(file, start, 12)
    if beginning[:4] in CHUNKS:
        return _read_chunks(file, start, size, thorough=thorough)
    if beginning[:4] in AU_LAYOUTS:
        return _read_au(file, start, size, thorough=thorough)
    size = max(begin, end_of_content(file, size))
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


def _searched(
    file: BinaryIO, begin: int, start: int, size: int, names: Iterable[bytes]
) -> Structure:
    """Return the structure of a recording that ends where another one is."""
    end = size if FLAC_START in names else min(size, start + SEARCHED_BYTES)
    following = next_recording(file, start, end, names)
    return Structure(begin, following or size, following)


def _ended(file: BinaryIO, begin: int, end: int, size: int) -> Structure:
    """Return the structure of a recording that ends there, with another behind it or none."""
    follows = begin < end < size and recording_begins(file, end)
    return Structure(begin, end, end) if follows else Structure(begin, size)


def _read_chunks(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of a file of chunks."""
    kind = CHUNKS[read_at(file, begin, 4)]
    header = kind.header
    position = begin + kind.head
    long_length: tuple[int, int] | None = None  # of the chunk "ds64", and where it stands
    audio: tuple[int, _Length] | None = None
    remark: str | None = None
    for _ in range(MOST_CHUNKS):
        if audio and recording_begins(file, position):
            return Structure(begin, position, position, remark=remark)
        content = read_at(file, position, header.size)
        if len(content) < header.size:
            break
        name, length = header.unpack(content)
        start, length = position + header.size, max(length - kind.counted, 0)
        if name == b"ds64":
            long_length = int.from_bytes(read_at(file, start + 8, 8), "little"), start + 8
        elif name == kind.audio and not audio:
            written = _length_of_audio(kind, start, length, long_length)
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


def _length_of_audio(
    kind: Chunks, start: int, length: int, long_length: tuple[int, int] | None
) -> _Length:
    """Return the length of audio that begins there, by its chunk's header or by "ds64"."""
    if length == IN_DS64 and long_length:
        return _Length(*long_length, struct.Struct("<Q"), kind.unknown)
    # Of each kind, the length stands at the end of the header.
    layout = struct.Struct(kind.header.format[0] + kind.header.format[-1])
    return _Length(length, start - layout.size, layout, kind.unknown, kind.counted)


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
    magic = read_at(file, begin, 4)
    names = [name for name in SIGNATURES if name.startswith(magic)] if thorough else []
    is_known = length.bytes_ < length.unknown
    searched_end = min(end_of_content(file, size), start + SEARCHED_BYTES)
    following = next_recording(file, start, searched_end, names)
    end = following or size
    if is_known and length.bytes_ > end - start:
        shortage = length.bytes_ / (end - start) if end > start else 1.0
        return Structure(begin, end, following, shortage=shortage)
    counted_end = start + length.bytes_ if is_known else start
    content_end = max(counted_end, end_of_content(file, end))
    remark = ZEROS if content_end < end else UNDERSTATED if is_known else None
    patch = length.patch(content_end - start)
    return Structure(begin, content_end, following, patch, remark)


def _next_chunk(file: BinaryIO, end: int, alignment: int) -> int:
    """Return where the chunk after one that ends there begins."""
    is_there = _is_name(read_at(file, end, 4)) or recording_begins(file, end)
    return end if is_there else end + -end % alignment


def _is_name(name: bytes) -> bool:
    return len(name) == 4 and all(32 <= letter < 127 for letter in name)


def _read_au(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of an AU file, which has one header and its audio."""
    content = read_at(file, begin, 16).ljust(16, b"\0")
    layout = AU_LAYOUTS[content[:4]]
    _, offset, count, _ = struct.unpack(layout, content)
    start = begin + max(offset, AU_HEADER_BYTES)
    length = _Length(count, begin + 8, struct.Struct(layout[0] + "I"), UNKNOWN_SIZE)
    end = start + count
    if count and end <= size and (size - end <= FEW_BYTES or recording_begins(file, end)):
        return _ended(file, begin, end, size)
    return _miscounted(file, begin, start, length, size, thorough=thorough)


def _read_pages(file: BinaryIO, begin: int, size: int) -> Structure:
    """Return the structure of an Ogg stream; another one that is chained to it follows it."""
    position, among_first, opus = begin, True, OpusPages()
    while position < size:
        page = read_at(file, position, OGG_HEADER.size + 255 + OPUS_BYTES)
        if page[:4] != b"OggS":
            if recording_begins(file, position):
                return Structure(begin, position, position)
            position = next(positions_of(file, b"OggS", position + 1, size), size)
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
    position, has_index = begin, False
    for _ in range(MOST_CHUNKS):
        head = read_at(file, position, 16)
        length = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        length = length or size - position  # 0: to the end, as long as a recorder is at work
        if len(head) < 8 or length < 8 or (position > begin and recording_begins(file, position)):
            break
        position += length
        has_index = has_index or (head[4:8] == b"moov" and position <= size)
    lacks_index = position + 8 > size and not has_index
    return _ended(file, begin, position, size)._replace(lacks_index=lacks_index)


def _read_ebml(file: BinaryIO, begin: int, size: int, *, thorough: bool) -> Structure:
    """Return the structure of a Matroska or WebM, which is a header and a segment."""
    position = begin
    for _ in range(2):
        head = read_at(file, position, 12)
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
    start = after_id3(file, begin)
    frame_of = adts_frame if adts_frame(read_at(file, start, FRAME_HEADER_BYTES)) else mp3_frame
    plain = Structure(begin, size)
    first = next(frames_of(file, start, size, frame_of), None)
    if first is None:
        return plain
    counted = None if frame_of is adts_frame else counted_bytes(read_at(file, first[0], 256))
    if counted and abs(counted - (size - first[0])) < FEW_BYTES:
        return plain
    total, end = 0.0, first[0]
    for position, length, seconds in frames_of(file, first[0], size, frame_of):
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
        frame_seconds=total if frame_of is mp3_frame else None,
        frames_promised=counted is not None,
    )


def _joint(file: BinaryIO, end: int, position: int) -> int | None:
    """Return where another recording begins between two frames, or behind the last one.

    MP3s without a tag between them are one to every decoder.
    """
    if position <= end:
        return None
    if following := next_recording(file, end, min(position, end + TAG_BYTES)):
        return following
    if counted_bytes(read_at(file, position, 48)) is not None:  # the header of another MP3
        return end
    return end if position > end + FEW_BYTES and recording_begins(file, end) else None
