"""The zip archives that torch.save writes, stored (uncompressed) members only (APPNOTE.TXT, PKWARE).

Nothing is extracted: what counts is where the bytes of each member lie. What PyTorch's own reader refuses is refused.
"""

import struct

from bdm_jax.formats.files import shown

_FOLDER = 0x10  # among a member's attributes
# Members that hold a number, and those that PyTorch reads.
_NUMBERS = {"version": range(1, 11), ".data/version": range(1, 11), ".storage_alignment": range(2**31)}


class Refused(Exception):
    """What is wrong with a checkpoint; its reader adds which."""


def members(data: memoryview, most: int) -> tuple[str, dict[str, tuple[int, int]]]:
    """The folder in which data.pkl lies ("" or one that ends in "/"), and each member's (begin, end) by its name.

    Raises Refused for what is no such archive, for one that contradicts itself, and for more members than `most`.
    """
    limit, members = directory(data, most)
    roots = [name.removesuffix("data.pkl") for name in members if name.rpartition("/")[2] == "data.pkl"]
    if len(roots) != 1:
        raise Refused("holds several data.pkl" if roots else "a zip file without data.pkl: not a PyTorch checkpoint")
    root = roots[0]
    if not root.endswith("/") or not all(name.startswith(root.partition("/")[0] + "/") for name in members):
        raise Refused("its members are not in one folder, as torch.save puts them")
    if any(name.startswith((f"{root}code/", f"{root}constants.pkl")) for name in members):
        raise Refused("a TorchScript program, which is code; save its state_dict instead")
    spans, reach = {}, 0
    for name, fields in sorted(members.items(), key=lambda item: item[1]):
        if fields[0] < reach:
            raise Refused(f"{shown(name)} overlaps the member before it")
        spans[name] = _, reach = _span(data, name, *fields)
        if reach > limit:
            raise Refused(f"{shown(name)} reaches beyond the place of the members")
    begin, end = spans.get(f"{root}byteorder", (0, 0))
    if end > begin and data[begin:end] != b"little":
        raise Refused("written on a big-endian machine, which is not read")
    for name, known in _NUMBERS.items():
        if (span := spans.get(root + name)) is not None:
            text = bytes(data[slice(*span)][:8]).strip()
            if not text.isdigit() or int(text) not in known:
                raise Refused(f"{shown(root + name)} is {shown(repr(text)[2:-1])}, which PyTorch does not read either")
    return root, spans


def directory(data: memoryview, most: int) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Where the archive's directory begins, and (offset, size, packed size, method, flags, mode) by member name.

    Reads nothing before it. Raises Refused as `members`, struct.error and ValueError for what is cut off.
    """
    end = len(data) - 22
    if end < 0 or data[end:][:4] != b"PK\5\6":
        raise Refused("truncated or followed by other bytes: it does not end with a zip directory")
    count, length, start = narrow = struct.unpack_from("<H2L", data, end + 10)
    disks = [struct.unpack_from("<3H", data, end + 4) == (0, 0, count)]
    if end >= 76 and data[end - 20 :][:4] == b"PK\6\7":  # zip64, for what does not fit 16 or 32 bits
        end -= 76
        count, length, start = wide = struct.unpack_from("<3Q", data, end + 32)
        agree = all(a in (b, top) for a, b, top in zip(narrow, wide, (2**16 - 1, 2**32 - 1, 2**32 - 1), strict=True))
        if data[end:][:4] != b"PK\6\6" or not agree:
            raise Refused("its two zip directories disagree")
        disks.append(struct.unpack_from("<Q4x2LQ", data, end + 4) == (44, 0, 0, count))
        disks.append(struct.unpack_from("<LQL", data, end + 60) == (0, end, 1))
    if start + length != end or count > most:
        raise Refused(f"its zip directory ({count} members in {length} bytes at {start}) is damaged or too large")
    if not all(disks):
        raise Refused("its zip directory speaks of several disks, or of another place than its own: not read")
    members, position = {}, start
    for _ in range(count):
        signature, flags, method, packed, size, names, extras, comments, disk, kind, mode, offset = struct.unpack_from(
            "<4s4x2H8x2L4H2x2HL", data, position
        )
        name = str(data[position + 46 :][:names], "utf-8")
        extra = data[position + 46 + names :][:extras]
        position += 46 + names + extras + comments
        if signature != b"PK\1\2" or position > end:
            raise Refused("its zip directory is damaged")
        if disk or kind & _FOLDER:
            raise Refused(f"{shown(name)} lies on another disk, or is a folder")
        if name in members:
            raise Refused(f"holds {shown(name)} twice")
        size, packed, offset = _widened(extra, [size, packed, offset])
        members[name] = offset, size, packed, method, flags, mode
    if position != end:
        raise Refused("its zip directory holds more than it says")
    return start, members


def _widened(extra: memoryview, values: list[int]) -> list[int]:
    """Sizes and offset of a member, those that do not fit 32 bits taken from its zip64 field."""
    while len(extra) >= 4:
        kind, length = struct.unpack_from("<2H", extra)
        if kind == 1:
            wide = iter(struct.unpack_from(f"<{length // 8}Q", extra, 4))
            return [next(wide, value) if value == 2**32 - 1 else value for value in values]
        extra = extra[4 + length :]
    return values


def _span(data: memoryview, name: str, offset: int, size: int, packed: int, method: int, flags: int, mode: int):
    """(begin, end) of a member's bytes, by its local header, which must say what the directory says."""
    if offset + 30 > len(data):
        raise Refused(f"{shown(name)} lies outside the file")
    signature, own_flags, own_method, own_packed, own_size, names, extras = struct.unpack_from(
        "<4s2x2H8x2L2H", data, offset
    )
    if signature != b"PK\3\4" or data[offset + 30 :][:names] != name.encode():
        raise Refused(f"{shown(name)} does not lie where the zip directory says")
    if (flags | own_flags) & 0x2061:
        raise Refused(f"{shown(name)} is encrypted or a patch")
    if method or own_method:
        raise Refused(f"{shown(name)} is compressed, which torch.save does not do")
    if mode & 0o170000 not in (0, 0o100000, 0o040000):
        raise Refused(f"{shown(name)} is a link, not a file")
    # A local header leaves its sizes open where they follow the bytes (flag 8), and sets all their bits above 4 GB.
    allowed = {size, 2**32 - 1, 0 if own_flags & 8 else size}
    if packed != size or not {own_packed, own_size} <= allowed:
        raise Refused(f"{shown(name)} has two sizes")
    begin = offset + 30 + names + extras
    return begin, begin + size
