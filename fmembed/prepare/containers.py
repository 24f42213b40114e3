"""What a sound's file says of its length, held against what it holds.

libsndfile (1.2) reads what is there of a file that was cut in half, and the first of two that were
put together, without a word; and nothing where a program that could not go back has left the length
at zero. So the length is looked up here, in the chunks, pages and frames that a file consists of.
Kinds of files that are not known here are left to libsndfile.
"""

from __future__ import annotations

import functools
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass


class DamagedSoundError(Exception):
    """A file is cut short, or several stand in one."""


def check_length(content: bytes) -> bytes:
    """A sound's file with its length in the header, where that was left open; else as it is.

    Raises:
        DamagedSoundError: There is less than the file says, or another file behind it.
    """
    magic = content[:4]
    if magic in _LAYOUTS:
        return _check_chunks(content, _LAYOUTS[magic])
    if magic in (b".snd", b"dns."):
        return _check_au(content)
    if magic == b"OggS":
        _check_ogg(content)
    elif content.startswith(b"NIST_1A"):
        _check_sphere(content)
    start = _skip_id3(content)
    if content.startswith(b"fLaC", start):
        return _check_flac(content, start)
    if _frame_bytes(content[start : start + 4]):
        return _check_mpeg(content, start)
    return content


def _cut(told: int, found: int, what: str = "bytes of samples") -> DamagedSoundError:
    return DamagedSoundError(
        f"it is cut short: it tells of {told:,} {what}, and {found:,} are there"
    )


def _chained() -> DamagedSoundError:
    return DamagedSoundError("several sounds stand in it, one behind another")


# Of chunks: WAV, AIFF, CAF and their kin.


@dataclass(frozen=True)
class _Layout:
    """How the chunks of a kind of file are written: a name, a size, the content, padding."""

    start: int
    name_bytes: int
    size: struct.Struct
    align: int
    samples: tuple[bytes, ...]
    counts_itself: bool = False

    @property
    def head_bytes(self) -> int:
        return self.name_bytes + self.size.size

    def chunks(self, content: bytes, at: int) -> Iterator[tuple[bytes, int, int]]:
        """Each chunk's name, and where its content begins and ends."""
        for _ in range(_MOST_CHUNKS):
            if at + self.head_bytes > len(content):
                return
            name = content[at : at + self.name_bytes]
            (size,) = self.size.unpack_from(content, at + self.name_bytes)
            at += self.head_bytes
            size -= self.head_bytes if self.counts_itself else 0
            yield name, at, at + size
            at += max(size + -size % self.align, 0)


_MOST_CHUNKS = 10_000  # zeros, too, are chunks

_W64_GUID = bytes.fromhex("f3acd3118cd100c04f8edb8a")
_RIFF = _Layout(12, 4, struct.Struct("<I"), 2, (b"data",))
_LAYOUTS = {
    b"RIFF": _RIFF,
    b"RIFX": _Layout(12, 4, struct.Struct(">I"), 2, (b"data",)),
    b"RF64": _RIFF,
    b"BW64": _RIFF,
    b"FORM": _Layout(12, 4, struct.Struct(">I"), 2, (b"SSND", b"BODY")),
    b"caff": _Layout(8, 4, struct.Struct(">q"), 1, (b"data",)),
    b"riff": _Layout(40, 16, struct.Struct("<q"), 8, (b"data" + _W64_GUID,), counts_itself=True),
}


def _check_chunks(content: bytes, layout: _Layout) -> bytes:
    chunks = layout.chunks(content, layout.start)
    begin, end = next(((b, e) for name, b, e in chunks if name in layout.samples), (0, 0))
    if not begin:
        return content
    size, size_at = layout.size, begin - layout.size.size
    told, found = end - begin, len(content) - begin
    if content[:4] in (b"RF64", b"BW64") and told == 2**32 - 1:
        size, size_at = _U64, 28  # of the samples, in the chunk "ds64" that comes first
        (told,) = size.unpack_from(content, size_at)
    if _is_open(told):
        # An AIFF has its length in two places, and libsndfile reads it to its end.
        if content[:4] == b"FORM" or (told == 0 and _is_of_chunks(content, begin, layout)):
            return content
        whole = size.pack(found + (layout.head_bytes if layout.counts_itself else 0))
        return content[:size_at] + whole + content[size_at + size.size :]
    # Some programs count the header too: all of it, or as the first length of a RIFF does.
    counts_head = content[:4] == b"RIFF" and told in (len(content), len(content) - 8)
    if told > found and not counts_head:
        raise _cut(told, found)
    end = begin + told + -told % layout.align
    rest = layout.chunks(content, end)
    # libsndfile pads CAF, whose chunks have no padding, by up to one byte.
    if content[:4] in content[end : end + 5] or any(n[:4] == content[:4] for n, _, _ in rest):
        raise _chained()
    return content


_U64 = struct.Struct("<Q")


def _is_open(told: int) -> bool:
    """Whether a length is what programs write that cannot come back to write the true one.

    0 and -1; near 2 GiB (sox: 0x7ffff000) and 4 GiB (ffmpeg), more than a source may hold.
    """
    return told <= 0 or 0 <= 2**31 - told <= 4096 or 0 < 2**32 - told <= 256 or told >= 2**63


def _is_of_chunks(content: bytes, at: int, layout: _Layout) -> bool:
    """Whether nothing but whole chunks follows: so there are no samples."""
    for name, begin, end in layout.chunks(content, at):
        is_name = all(32 <= byte < 127 for byte in name[:4])
        if not is_name or end < begin or end > len(content):
            return False
        at = end
    return len(content) - at < layout.head_bytes


def _check_au(content: bytes) -> bytes:
    order = ">" if content[0:1] == b"." else "<"
    if len(content) < 12:
        return content
    start, told = struct.unpack_from(f"{order}II", content, 4)
    found = len(content) - start
    if told == 0 and found > 0:
        return content[:8] + b"\xff" * 4 + content[12:]  # "unknown"
    if not _is_open(told) and told > found:
        raise _cut(told, found)
    if content.startswith(content[:4], start + told):
        raise _chained()
    return content


def _check_sphere(content: bytes) -> None:
    """NIST's SPHERE, whose header is text."""
    size = re.match(rb"NIST_1A\s+(\d{1,8})\s", content)
    head_bytes = int(size[1]) if size else 0
    head = content[:head_bytes]

    def field(name: bytes) -> int:
        said = re.search(rb"%b -i (\d+)" % name, head)
        return int(said[1]) if said else 0

    told = field(b"sample_count") * field(b"sample_n_bytes") * max(field(b"channel_count"), 1)
    if told > len(content) - head_bytes:
        raise _cut(told, len(content) - head_bytes)
    if told and content.startswith(b"NIST_1A", head_bytes + told):
        raise _chained()


# Of pages: Vorbis, Opus and FLAC in Ogg.


def _check_ogg(content: bytes) -> None:
    open_streams: set[bytes] = set()
    at, begins = 0, True
    while content.startswith(b"OggS", at):
        start, flags, serial = at, content[at + 5 : at + 6], content[at + 14 : at + 18]
        lengths = content[at + 27 : at + 27 + int.from_bytes(content[at + 26 : at + 27])]
        at += 27 + len(lengths) + sum(lengths)
        if at > len(content) or not flags:
            raise DamagedSoundError("it is cut short: its last page is not whole")
        if not _has_checksum(content[start:at]):
            # libogg leaves such a page out, and what comes behind it moves up.
            raise DamagedSoundError(f"the page at byte {start:,} does not match its checksum")
        if flags[0] & _FIRST_PAGE:
            if not begins:
                raise _chained()
            open_streams.add(serial)
        begins = bool(flags[0] & _FIRST_PAGE)
        if flags[0] & _LAST_PAGE:
            open_streams.discard(serial)
    if open_streams:
        raise DamagedSoundError("it is cut short: the page that ends it is missing")


def _has_checksum(page: bytes) -> bool:
    """Whether a page's CRC-32 is that of its bytes; Ogg's has the highest bit first, zlib's last.

    zlib's begins and ends with all bits flipped, so that a number is handed in and taken flipped.
    """
    bare = page[:22] + bytes(4) + page[26:]
    found = zlib.crc32(bare.translate(_MIRRORED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return found.to_bytes(4, "big").translate(_MIRRORED) == page[22:26]


_FIRST_PAGE, _LAST_PAGE = 2, 4
_MIRRORED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


# Of frames: FLAC.


_FLAC_HEAD = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")


def _check_flac(content: bytes, start: int) -> bytes:
    if _FLAC_HEAD.search(content, start + 4):
        raise _chained()
    length_at = start + 21  # 36 bits, of which the first four stand in a byte with others
    head = content[length_at : length_at + 5]
    if len(head) == 5 and not head[0] & 15 and not any(head[1:]):
        nominal = int.from_bytes(content[start + 8 : start + 10], "big")
        length = _last_sample(content, nominal).to_bytes(8, "big")[-5:]
        length = bytes([head[0] & 0xF0 | length[0] & 15]) + length[1:]
        return content[:length_at] + length + content[length_at + 5 :]
    return content


def _last_sample(content: bytes, nominal: int) -> int:
    """How many samples a FLAC has by its last frame, which says how many come before; or 0.

    Args:
        content: The file.
        nominal: Samples of each frame but the last, where the frames are counted.
    """
    at, num_tries = len(content), 0
    while (at := content.rfind(b"\xff", 0, at)) >= max(len(content) - _MOST_FRAME_BYTES, 0):
        head = content[at : at + 16]
        if len(head) < 16 or head[1] not in (0xF8, 0xF9):
            continue
        size, rate, more = head[2] >> 4, head[2] & 15, 0
        while head[4] << more & 0x80:  # a number as in UTF-8
            more += 1
        number_bytes = max(more, 1)
        number = head[4] & (0xFF >> (more + 1) if more else 0x7F)
        for byte in head[5 : 4 + number_bytes]:
            number = number << 6 | byte & 63
        end = 4 + number_bytes
        size_bytes = {6: 1, 7: 2}.get(size, 0)
        if size_bytes:
            block = int.from_bytes(head[end : end + size_bytes], "big") + 1
        else:
            block = 192 if size == 1 else 576 << size - 2 if size < 6 else 256 << size - 8
        end += size_bytes + {12: 1, 13: 2, 14: 2}.get(rate, 0)
        if _crc(head[:end], 8, 0x07) != head[end]:
            continue
        if not _crc(content[at:], 16, 0x8005):
            return number + block if head[1] & 1 else number * nominal + block
        num_tries += 1
        if num_tries == _MOST_TRIES:
            break
    return 0


# So that a file made for it cannot keep us busy: to check so many bytes takes 0.1 s.
_MOST_FRAME_BYTES, _MOST_TRIES = 2**20, 8


def _crc(content: bytes, num_bits: int, polynomial: int) -> int:
    """The checksum of a FLAC's frames and of their heads; of what ends in its own it is 0."""
    table = _crc_table(num_bits, polynomial)
    mask, crc = (1 << num_bits) - 1, 0
    for byte in content:
        crc = crc << 8 & mask ^ table[crc >> num_bits - 8 ^ byte]
    return crc


@functools.cache
def _crc_table(num_bits: int, polynomial: int) -> list[int]:
    mask, table = (1 << num_bits) - 1, []
    for crc in range(256):
        crc <<= num_bits - 8
        for _ in range(8):
            crc = crc << 1 & mask ^ (polynomial if crc >> num_bits - 1 else 0)
        table.append(crc)
    return table


# Of frames: MP3 and its elders.


def _skip_id3(content: bytes) -> int:
    """Where the tags end that stand before a sound."""
    at = 0
    while content.startswith(b"ID3", at) and len(content) >= at + 10:
        flags, sizes = content[at + 5], content[at + 6 : at + 10]
        size = functools.reduce(lambda size, byte: size << 7 | byte & 127, sizes, 0)
        at += 10 + size + (10 if flags & 16 else 0)
    return at


def _check_mpeg(content: bytes, start: int) -> bytes:
    first = content[start : start + 4]
    num_frames, rates, at = 0, set(), start
    while at + 4 <= len(content):
        head = content[at : at + 4]
        size = _frame_bytes(head) if _goes_on(first, head) else 0
        if not size:
            at = _find_frame(content, at + 1, first)
        elif at + size > len(content):
            break
        else:
            num_frames += 1
            rates.add(head[2] >> 4)
            at += size
    if content.startswith(b"\xff", at):
        raise DamagedSoundError("it is cut short: its last frame is not whole")
    if content.endswith(bytes(_MOST_ZEROS)):
        raise DamagedSoundError("it is cut short: what follows its last frame is zeros")
    told = _told_frames(content[start : start + min(_frame_bytes(first), 64)])
    # Some count the frame that holds the table, so one more or less is well.
    if told and num_frames < told:
        raise _cut(told, num_frames - 1, "frames")
    if told and num_frames > told + 2:
        raise _chained()
    if told is None and len(rates) > 1 and (first[1] >> 1 & 3) == 1:
        # libsndfile guesses the length by the first frame's rate and stops there: of a sound at
        # varying rates it read 132,891 samples of 321,408.
        head = bytes([first[0], first[1] | 1, first[2] & 0x0C | 0x80, first[3]])
        table = head + bytes(_side_bytes(head)) + b"Xing" + struct.pack(">II", 1, num_frames)
        return content[:start] + table.ljust(_frame_bytes(head), b"\0") + content[start:]
    return content


def _told_frames(frame: bytes) -> int | None:
    """How many frames there are by a table in the first; 0 if it does not say, None without one."""
    for name, at in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        found = frame.find(name)
        if found > 0 and len(frame) >= found + at + 4:
            has_count = name == b"VBRI" or frame[found + 7] & 1
            return int.from_bytes(frame[found + at : found + at + 4], "big") if has_count else 0
    return None


def _goes_on(first: bytes, head: bytes) -> bool:
    """Whether a frame is of the same version, layer and sampling rate."""
    return not ((first[1] ^ head[1]) & 0x1E or (first[2] ^ head[2]) & 0x0C)


def _find_frame(content: bytes, at: int, first: bytes) -> int:
    """Where the next frame begins that another one follows, or the end; as decoders look for it."""
    stop = at + _MOST_GAP_BYTES
    while (at := content.find(b"\xff", at, stop)) >= 0:
        head = content[at : at + 4]
        if len(head) == 4 and _goes_on(first, head) and (size := _frame_bytes(head)):
            following = content[at + size : at + size + 4]
            if len(following) == 4 and _goes_on(first, following) and _frame_bytes(following):
                return at
        at += 1
    return len(content)


_MOST_ZEROS = 4096  # more than a frame may have; so ends a file that was given its length first
_MOST_GAP_BYTES = 2**20  # a picture of its own between two songs


def _side_bytes(head: bytes) -> int:
    """The side information of a frame of layer 3."""
    is_mono, is_first_version = head[3] >> 6 == 3, head[1] & 8
    if is_first_version:
        return 17 if is_mono else 32
    return 9 if is_mono else 17


@functools.lru_cache(maxsize=4096)
def _frame_bytes(head: bytes) -> int:
    """The length of a frame by its first four bytes; 0 if it is none, or says nothing of it."""
    if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return 0
    version, layer = head[1] >> 3 & 3, 4 - (head[1] >> 1 & 3)
    kbit_at, hz_at = head[2] >> 4, head[2] >> 2 & 3
    if version == 1 or layer == 4 or kbit_at in (0, 15) or hz_at == 3:
        return 0
    is_first_version = version == 3
    kbit_s = _KBIT_S[is_first_version, layer][kbit_at - 1]
    hz = (44_100, 48_000, 32_000)[hz_at] >> {3: 0, 2: 1, 0: 2}[version]
    padding = head[2] >> 1 & 1
    if layer == 1:
        return (12_000 * kbit_s // hz + padding) * 4
    return (144_000 if is_first_version or layer == 2 else 72_000) * kbit_s // hz + padding


_LOW = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_KBIT_S = {
    (True, 1): tuple(range(32, 449, 32)),
    (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
    (False, 2): _LOW,
    (False, 3): _LOW,
}
