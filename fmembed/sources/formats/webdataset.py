"""WebDataset: tar files, a sample to a name."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import tarfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

import pyarrow as pa

from fmembed.sources.formats.base import Format, over_files
from fmembed.sources.formats.ranges import cut_bytes, open_shard, with_marks
from fmembed.sources.source import File, Mark, RawRow, Rejection, Shard, Source
from fmembed.spec import SourceSpec

_SAMPLE_ROWS, _SAMPLE_MEMBERS = 10, 10_000
# Members of these extensions are text; all others are bytes.
_TEXTS = ("txt", "text", "caption")
# What a tar member's long name or extended header may take.
_MAX_HEADER_BYTES = 2**20


def read_webdataset(source: Source, shard: Shard, file: File) -> Iterator[RawRow]:
    """Samples of a tar file, or of a part of one: members of one name, a column for each extension.

    Read as a stream: nothing is extracted, so that a member's name is never a path, and a link
    never leads anywhere.
    """
    wanted = frozenset(source.spec.wanted)
    num_samples = shard.first_row
    found = _members(source, shard, file, wanted)
    for key, members in itertools.groupby(found, key=lambda m: m[0]):
        row: dict[Any, Any] = {"__key__": key}
        fate: Rejection | None = None
        seen: set[str] = set()
        first = num_samples
        for _key, name, member, archive in members:
            if name not in wanted:
                continue
            if name in seen:
                # Two samples of one name: nothing says which of them the other members belong to.
                fate = "ambiguous sample", f"there is more than one member {key[:200]}.{name}"
                seen.clear()
                num_samples += 1
            seen.add(name)
            most = source.most_bytes if name == source.spec.input else source.spec.max_text_bytes
            if fate is not None:
                continue
            if not member.isreg():
                fate = "unreadable file", f"member {key}.{name}: neither a file nor a folder"
            elif member.size > most:
                message = f"member {key}.{name}: {member.size:,} bytes, more than {most:,}"
                fate = "row too large", message
            else:
                opened = archive.extractfile(member)
                assert opened is not None
                content = opened.read()
                # A label or caption ends as the file that it was in did: with a line's end.
                row[name] = content if name == source.spec.input else content.strip()
        num_samples += 1
        for i in range(first, num_samples):
            yield f"{file.name}#{i}", fate or row


def cut_tar(_: SourceSpec, fs: Any, file: File) -> list[Shard]:
    """Cut a file that is not compressed, whatever it is called."""
    return cut_bytes(fs, file, lambda head: not head.startswith(tuple(_UNFOLD)))


def locate_tar(
    source: Source, parts: Sequence[Shard], _: Sequence[Any], begin: Mark
) -> list[Shard]:
    """Where samples begin: only one header after another tells; what is between is not read.

    Of an archive that breaks off, or that has headers for all that follows, the rest is one part.
    """
    (file,), starts = parts[0].files, [part.start or 0 for part in parts[1:]]
    stop, marks = parts[-1].stop or 0, [begin]
    wanted, num_samples = frozenset(source.spec.wanted), begin.row
    seen: set[str] = set()
    last: str | None = None
    with _to_the_end(), source.fs.open(file.path, "rb") as raw:
        raw.seek(begin.byte)
        header = type("_Header", (_Header,), {})
        with tarfile.open(fileobj=raw, mode="r:", tarinfo=header, ignore_zeros=True) as archive:
            for key, name, member in _walk(archive, wanted):
                if key != last:
                    if header.num_global:  # type: ignore[attr-defined]
                        marks = [begin]
                        break
                    while len(marks) <= len(starts) and member.offset >= starts[len(marks) - 1]:
                        marks.append(Mark(member.offset, num_samples, 0))
                    if len(marks) > len(starts):
                        break
                    num_samples += 1
                    last, seen = key, set()
                if name in wanted and name in seen:  # as in `read_webdataset`
                    num_samples += 1
                    seen.clear()
                seen.add(name)
    return with_marks(parts, marks + [Mark(stop, 0, 0)] * (len(parts) + 1 - len(marks)))


@contextlib.contextmanager
def _to_the_end() -> Iterator[None]:
    """Whatever tarfile raises of an archive's headers ends it; storage that fails does not."""
    try:
        yield
    except OSError:
        raise
    except Exception:  # TarError, and of what headers say ValueError and more
        return


def webdataset_schema(source: Source, file: File) -> pa.Schema:
    wanted = frozenset(source.spec.wanted)
    members = itertools.islice(_members(source, Shard(), file, wanted), _SAMPLE_MEMBERS)
    samples = itertools.groupby(members, key=lambda found: found[0])
    names: dict[str, None] = {}
    try:
        for _, members_of_sample in itertools.islice(samples, _SAMPLE_ROWS):
            names.update((name, None) for _, name, *_ in members_of_sample)
    except Exception:  # the rest of the file is broken; its rows will be rejected with the cause
        if not names:
            raise
    # What is carried beside the input (cls, txt, json) is text.
    return pa.schema([pa.field(c, pa.string()) for c in ("__key__", *names)])


def _is_text(spec: SourceSpec, _: pa.Schema) -> bool:
    return spec.input in _TEXTS


def _members(
    source: Source, shard: Shard, file: File, wanted: frozenset[str]
) -> Iterator[tuple[str, str, tarfile.TarInfo, tarfile.TarFile]]:
    """Key and extension of each member, and where to read it before the next one is asked for.

    Raises:
        tarfile.ReadError: It breaks off, or something in it is no archive.
    """
    is_last = shard.marks is None or shard.marks[1].byte == file.size
    if shard.marks is None:  # unfolded by what it is, not by what it is called
        opened = source.fs.open(file.path, "rb")
    elif shard.marks[0].byte < shard.marks[1].byte:
        opened = open_shard(source, shard, file)
    else:
        return
    with opened as raw:
        buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(raw)
        # A part begins with a name, which may begin as such files do.
        start = buffered.peek(3) if shard.marks is None else b""
        # Unfolded here, a little at a time: tarfile unfolds ten kilobytes at once, which may become
        # gigabytes.
        unfold = next((open_ for magic, open_ in _UNFOLD.items() if start.startswith(magic)), None)
        stream: Any = unfold(buffered) if unfold else buffered
        # Beyond its end mark too: archives are put together with `cat`.
        header = type("_Header", (_Header,), {})
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=header, ignore_zeros=True) as archive:
            for key, name, member in _walk(archive, wanted):
                yield key, name, member, archive
        if is_last and not header.num_ends:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the archive has no end mark: it may be cut short")


def _walk(
    archive: tarfile.TarFile, wanted: frozenset[str]
) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """Key and extension of each member.

    Extensions are in lower case, but for one that is wanted as it stands. What a Mac adds to an
    archive (`._name`, `__MACOSX`) and other hidden files are left out, as `webdataset` does: they
    stand between the members of a sample.
    """
    while (member := archive.next()) is not None:
        # tarfile would keep the header of every member.
        archive.members = []  # type: ignore[attr-defined]
        archive.pax_headers = {}
        folder, _, base = member.name.rpartition("/")
        if not member.isdir() and not base.startswith(".") and "__MACOSX" not in folder:
            stem, _, name = base.partition(".")
            name = name if name in wanted else name.lower()
            yield f"{folder}/{stem}" if folder else stem, name, member


_UNFOLD: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7": lzma.open,
}  # fmt: skip


class _Header(tarfile.TarInfo):
    """A tar header; of one that is followed by its own extension the length is looked at first.

    `num_ends` counts the blocks of an end mark that came after the last member, `num_global` the
    headers that are for all that follows, of the one archive that a subclass is for.
    """

    num_ends = num_global = 0

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as e:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):
                cls.num_ends += 1
            elif buf:  # tarfile would take what is no header for the end of the archive
                raise tarfile.ReadError(f"what should be a member is none: {e}") from None
            raise
        cls.num_ends = 0
        cls.num_global += header.type == tarfile.XGLTYPE
        if header.type in _EXTENSIONS and header.size > _MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {header.size:,} bytes")
        return header


_EXTENSIONS = (
    tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)  # fmt: skip


WEBDATASET = Format(
    name="webdataset",
    suffixes=(".tar", ".tar.gz", ".tgz"),
    rows=read_webdataset,
    schema=over_files(webdataset_schema),
    is_text=_is_text,
    cut=cut_tar,
    count=lambda *_: None,
    locate=locate_tar,
)
