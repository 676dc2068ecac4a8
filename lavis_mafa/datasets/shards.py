"""Tar shards as webdataset and img2dataset write them: members ``KEY.jpg``, ``KEY.txt``, ``KEY.json`` are one sample.

A tar is read for its headers alone, and for the texts of the samples; nothing of it is unpacked, so names lead nowhere.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Collection, Sequence
from glob import glob, has_magic
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from braceexpand import braceexpand

from lavis_mafa.errors import UserError

IMAGES = ("jpg", "jpeg", "png", "webp", "avif", "gif", "bmp", "tif", "tiff", "ppm", "jp2")
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
# as webdataset: what follows the first dot of the last part tells the kind; hidden files have no key
MEMBER = re.compile(r"(?P<key>(?:.*/)?[^/.]+)\.(?P<ending>[^/]+)", re.DOTALL)
LONGEST = 1 << 20  # bytes of a member that is read as text


class Member(NamedTuple):
    name: str
    offset: int
    size: int
    content: bytes | None  # of what was asked for


Sample = dict[str, Member]  # by what follows the key's dot, in lower case


def shard_files(patterns: Sequence[str]) -> list[Path]:
    """What ``data/{00000..00099}.tar``, ``data/*.tar`` and plain paths name, those of a pattern sorted by name.

    Raises:
        UserError: one is not there or is named twice, or a pattern matches nothing.
    """
    found: list[Path] = []
    for pattern in patterns:
        try:
            names = [*braceexpand(pattern)]
        except ValueError as error:
            raise UserError(f"{pattern!r} is no pattern of shards: {error}; such as 'data/{{00000..00099}}.tar'.") from error
        absent = []
        for name in names:
            matching = sorted(glob(name, recursive=True)) if has_magic(name) and not Path(name).exists() else [name]
            here = [Path(one) for one in matching if Path(one).is_file()]
            found += here
            absent += [] if here else [name]
        if absent and Path(absent[0]).is_dir():
            raise UserError(f"{absent[0]} is a folder; '{absent[0]}/*.tar' names the shards in it.")
        if absent:
            more = f" ({len(absent)} of {len(names)} are missing; 'data/*.tar' names those that are there)" if len(names) > 1 else ""
            raise UserError(f"no shard {absent[0]}{more}.")
    twice = next((path for path in found if found.count(path) > 1), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise UserError(f"{twice} is named twice; allowed: each shard once.")
    return found


def read_samples(path: Path, texts: Collection[str], progress: Callable[[int], None] = lambda _: None) -> dict[str, Sample]:
    """The samples of a shard by key, in its order, from one pass over its headers.

    Args:
        texts: kinds of members (``txt``) whose content is read too, up to 1 MiB of each.
        progress: called with the number of bytes that were passed since the last call.

    Raises:
        UserError: it is compressed, truncated or no tar; a member is a link, a device or stored in pieces, or is there twice.
    """
    with path.open("rb") as file:
        start = file.read(8)
        for magic, command in COMPRESSED.items():
            if start.startswith(magic):
                raise UserError(
                    f"{path} is compressed, and of a compressed tar nothing can be read without all that stands before it; unpack it "
                    f"once: {command} < {path} > NEW.tar (images are compressed already, so it hardly grows)."
                )
        file.seek(0)
        try:
            return _read(path, file, texts, progress)
        except (tarfile.TarError, EOFError, ValueError, OverflowError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no tar, or broken: {error}.") from error


def _read(path: Path, file: BinaryIO, texts: Collection[str], progress: Callable[[int], None]) -> dict[str, Sample]:
    samples: dict[str, Sample] = {}
    passed, member = 0, None
    archive: Any = tarfile.TarFile(fileobj=file, errors="backslashreplace")
    while True:
        try:
            member = archive.next()
        except tarfile.ReadError as error:
            raise UserError(f"{path} is truncated: its last member, {_last(samples)}, is not all there. Copy it again.") from error
        progress(archive.offset - passed)
        passed = archive.offset
        if member is None:
            break
        archive.members.clear()  # it would keep every header, about 1 KB each
        if member.isdir():
            continue
        if not member.isreg() or member.issparse():
            kind = "a link" if member.issym() or member.islnk() else "stored in pieces" if member.issparse() else "a device or a pipe"
            raise UserError(
                f"{path}: its member {member.name!r} is {kind}; allowed: plain files (tar --dereference packs what links lead to)."
            )
        parts = MEMBER.fullmatch(member.name)
        if parts is None:
            continue
        sample, kind = samples.setdefault(parts["key"], {}), parts["ending"].lower()
        if kind in sample:
            raise UserError(f"{path}: its member {member.name!r} is there twice; allowed: each key once in a shard.")
        content = None
        if kind in texts and member.size <= LONGEST:
            file.seek(member.offset_data)
            content = file.read(member.size)
        sample[kind] = Member(member.name, member.offset_data, member.size, content)
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:  # cut off where a member ends
        raise UserError(f"{path} is truncated: the blocks that end a tar are missing after {_last(samples)}. Copy it again.")
    if block.count(0) < tarfile.BLOCKSIZE:
        raise UserError(f"{path} is broken at byte {archive.offset:,}: no header of a member stands there.")
    return samples


def _last(samples: dict[str, Sample]) -> str:
    sample = next(reversed(samples.values()), None)
    return "its beginning" if sample is None else repr([*sample.values()][-1].name)


def image_of(path: Path, sample: Sample) -> Member | None:
    """The one image of a sample; UserError: it has several."""
    found = [sample[kind] for kind in sample if kind in IMAGES]
    if len(found) > 1:
        raise UserError(f"{path}: {found[0].name!r} and {found[1].name!r} are two images of one key; allowed: one.")
    return found[0] if found else None
