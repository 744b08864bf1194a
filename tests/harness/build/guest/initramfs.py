"""Writing an initramfs without root, and finding the shared libraries of a program for it.

The archive is the kernel's "newc" cpio format (Documentation/driver-api/early-userspace/buffer-format.rst). Owners,
times and inode numbers are fixed, so equal contents give equal bytes.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Mapping

__all__ = ["Archive", "needed_libraries"]


class Archive:
    """The root file system of the guest. Folders come by themselves, before what is in them."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[int, bytes, tuple[int, int]]] = {}

    def folder(self, path: str) -> None:
        """An empty folder, with all above it."""
        parent, _, _ = path.rpartition("/")
        if parent:
            self.folder(parent)
        self._entries.setdefault(path, (stat.S_IFDIR | 0o755, b"", (0, 0)))

    def file(self, path: str, contents: bytes, mode: int = 0o644) -> None:
        """A regular file."""
        self._put(path, stat.S_IFREG | mode, contents)

    def link(self, path: str, target: str) -> None:
        """A symbolic link."""
        self._put(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """A device node: only a number in the archive, so writing it needs no right."""
        self._put(path, stat.S_IFCHR | 0o600, b"", (major, minor))

    def _put(self, path: str, mode: int, contents: bytes, device: tuple[int, int] = (0, 0)) -> None:
        parent, _, _ = path.rpartition("/")
        if parent:
            self.folder(parent)
        self._entries[path] = (mode, contents, device)

    def __contains__(self, path: str) -> bool:
        return path in self._entries

    def cpio(self) -> bytes:
        """The archive. In order of path, so a folder stands before its contents."""
        parts = [
            _record(number, path, mode, contents, device)
            for number, (path, (mode, contents, device)) in enumerate(sorted(self._entries.items()), start=1)
        ]
        return b"".join([*parts, _record(0, "TRAILER!!!", 0, b"", (0, 0))])


def _record(inode: int, path: str, mode: int, contents: bytes, device: tuple[int, int]) -> bytes:
    name = path.encode() + b"\0"
    # ino, mode, uid, gid, nlink, mtime, filesize, devmajor, devminor, rdevmajor, rdevminor, namesize, check
    fields = (inode, mode, 0, 0, 1, 0, len(contents), 0, 0, *device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    return _padded(head) + _padded(contents)


def _padded(part: bytes) -> bytes:
    return part + b"\0" * (-len(part) % 4)


DT_NEEDED = 1
DT_STRTAB = 5
PT_LOAD = 1
PT_DYNAMIC = 2


def needed_libraries(program: bytes) -> list[str]:
    """The DT_NEEDED entries of a 64-bit little-endian ELF file: what `readelf -d` shows as NEEDED."""
    if program[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit little-endian ELF file")
    (offset,) = struct.unpack_from("<Q", program, 0x20)
    size, count = struct.unpack_from("<HH", program, 0x36)
    # type, flags, offset, vaddr, paddr, filesz, memsz, align
    headers = [struct.unpack_from("<IIQQQQQQ", program, offset + size * i) for i in range(count)]
    dynamic: Mapping[int, list[int]] = {DT_NEEDED: [], DT_STRTAB: []}
    for header in headers:
        if header[0] == PT_DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", program[header[2] : header[2] + header[5]]):
                if tag in dynamic:
                    dynamic[tag].append(value)
    if not dynamic[DT_NEEDED]:
        return []
    address = dynamic[DT_STRTAB][0]
    load = next(h for h in headers if h[0] == PT_LOAD and h[3] <= address < h[3] + h[5])
    strings = load[2] + address - load[3]
    starts = [strings + value for value in dynamic[DT_NEEDED]]
    return [program[start : program.index(b"\0", start)].decode() for start in starts]
