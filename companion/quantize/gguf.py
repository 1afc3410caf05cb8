"""GGUF, the one-file format of llama.cpp: metadata, tensor descriptions, tensors (ggml, docs/gguf.md).

    magic "GGUF", version, number of tensors, number of metadata pairs
    each pair: key, type, value                  an array's value: its elements' type, their number, they
    each tensor: name, shape, type, offset       the offset counts from where the tensors' bytes begin
    zeros up to a multiple of general.alignment (32 if absent)
    the tensors' bytes, each padded likewise

Numbers are little endian, strings are UTF-8 behind a 64-bit length, shapes are written fastest dimension
first: the reverse of torch's. Versions 2 and 3 are alike (3 allowed a big-endian twin, refused here);
version 1 had 32-bit lengths. A file is foreign bytes: every number in it is checked against what the file
holds before it is used, so a wrong one costs a ValueError, and neither time nor memory beyond the header's.
"""

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from companion._checks import check_choice
from companion._io import atomic_write
from companion.quantize.blocks import BLOCKS, dequantise

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32

_SCALARS = {  # code in the file → name and struct letter
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
_STRING, _ARRAY = 8, 9
_CODES = {name: code for code, (name, _) in _SCALARS.items()} | {"string": _STRING}
_PACKERS = {code: struct.Struct("<" + letter) for code, (_, letter) in _SCALARS.items()}
_SMALLEST = {code: packer.size for code, packer in _PACKERS.items()} | {_STRING: 8, _ARRAY: 12}  # bytes
_UINT32, _UINT64 = _PACKERS[4], _PACKERS[10]

_TENSOR_CODES = {  # ggml's; the gaps are types that it has withdrawn
    **{"F64": 28, "F32": 0, "F16": 1, "BF16": 30, "I64": 27, "I32": 26, "I16": 25, "I8": 24},
    **{"Q1_0": 41, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q8_1": 9},
    **{"Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13, "Q6_K": 14, "Q8_K": 15},
    **{"IQ1_S": 19, "IQ1_M": 29, "IQ2_XXS": 16, "IQ2_XS": 17, "IQ2_S": 22, "IQ3_XXS": 18, "IQ3_S": 21},
    **{"IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "NVFP4": 40},
}
_TENSOR_TYPES = {code: name for name, code in _TENSOR_CODES.items()}
_SIZES = BLOCKS | {  # elements and bytes of a block; these types are carried, but not decoded in blocks
    **{"F64": (1, 8), "I64": (1, 8), "I32": (1, 4), "I16": (1, 2), "I8": (1, 1)},
    **{"Q1_0": (128, 18), "Q8_1": (32, 40), "Q8_K": (256, 292)},
    **{"IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82)},
    **{"IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136)},
    **{"TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36)},
}
_PLAIN = {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "F64": "<f8"}  # numbers as numpy reads them
_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
}

_LONGEST_HEADER = 2**25  # bytes before the tensors: 32 MiB; a vocabulary of 49,152 tokens takes 1.8 million
_MOST_ENTRIES = 2**16  # metadata pairs, and tensors
_LONGEST_KEY = 2**16 - 1  # bytes, by the specification
_LONGEST_TENSOR_NAME = 64  # bytes, by the specification; asked of what is written, not of what is read
_MOST_DIMENSIONS = 4  # as in ggml
_MOST_ELEMENTS = 2**60  # so that their bytes can be counted in 63 bits, whatever the dtype
_DEEPEST_ARRAY = 8  # arrays in arrays; ggml reads none


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies.

    Attributes:
        name: its name, such as "blk.0.attn_q.weight".
        shape: its sizes in torch's order, rows first.
        type: how its numbers are coded: "F32", "Q4_1", …
        offset: its first byte, counted from the start of the file.
        nbytes: how many bytes it takes.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUFFile:
    """A GGUF file, mapped read-only: its header is read now, its tensors when they are asked for.

    Made by `GGUFFile.open(path)` or `GGUFFile.from_buffer(data)`; use it in a `with`, or call `close`.

    Attributes:
        version: 2 or 3.
        alignment: the tensors begin at multiples of it, in bytes.
        metadata: key → bool, int, float, str or list.
        types: key → the type the file gives it: "uint32", "string", "array[int32]", …; for an array of
            arrays the list of their types. `write_gguf` takes it to write the same file again.
        tensors: name → TensorInfo, in the file's order.
    """

    def __init__(self, data: np.ndarray, source: str = "the buffer"):
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 1:
            raise TypeError(f"data must be a one-dimensional array of uint8, got {type(data).__name__}")
        self._source = source
        self._data = data.view()
        self._data.flags.writeable = False
        try:
            self._read_header()
        except ValueError as error:
            raise ValueError(f"{source} is not a GGUF file that can be read: {error}") from None

    @classmethod
    def open(cls, path) -> "GGUFFile":
        """Map the file at `path` and read its header.

        Raises ValueError if the file is malformed, OSError if it cannot be opened. A file that is cut short
        by another process while it is mapped ends this one, as for every memory map.
        """
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is not a GGUF file that can be read: it is empty")
        return cls(np.memmap(path, dtype=np.uint8, mode="r"), str(path))

    @classmethod
    def from_buffer(cls, data) -> "GGUFFile":
        """Read a file that lies in memory, as bytes or any other contiguous buffer. Nothing is copied."""
        return cls(np.frombuffer(data, dtype=np.uint8))

    def raw(self, name: str) -> np.ndarray:
        """The bytes of a tensor as they lie in the file: a read-only view, uint8, shape (nbytes,)."""
        info = self._info(name)
        if self._data is None:
            raise ValueError(f"{self._source} is closed")
        return self._data[info.offset : info.offset + info.nbytes]

    def tensor(self, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
        """The tensor in `dtype`, decoded; its shape is that of its TensorInfo.

        Raises ValueError if no tensor has that name, or if its type is not one that is decoded here: then
        `raw` still gives its bytes.
        """
        info, raw = self._info(name), self.raw(name)
        if info.type in BLOCKS:
            decoded = dequantise(raw, info.type, info.shape).to(dtype)
            self._forget()
            return decoded
        if info.type in _PLAIN:
            return torch.from_numpy(raw.view(_PLAIN[info.type]).reshape(info.shape).copy()).to(dtype)
        raise ValueError(
            f"the tensor {name!r} has type {info.type}; decoded are {', '.join([*BLOCKS, *_PLAIN])}"
        )

    def _forget(self) -> None:
        """Let the system take back the pages of the file that were read; it reads them again when asked."""
        pages = getattr(self._data.base, "_mmap", None)
        if hasattr(pages, "madvise"):  # not on Windows
            pages.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let go of the file. The map itself ends with the last array that `raw` gave out."""
        self._data = None

    def __enter__(self) -> "GGUFFile":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _info(self, name: str) -> TensorInfo:
        if name not in self.tensors:
            raise ValueError(f"{self._source} has no tensor {name!r}")
        return self.tensors[name]

    def _read_header(self) -> None:
        header = _Header(self._data)
        self.version, num_tensors, num_pairs = header.start()
        self.metadata, self.types = {}, {}
        for _ in range(num_pairs):
            key = header.string("a key", _LONGEST_KEY)
            if key in self.metadata:
                raise ValueError(f"the key {_short(key)} comes twice")
            self.types[key], self.metadata[key] = header.value(header.number(_UINT32, "a type"))
        self.alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        _check_alignment(self.alignment, self.types.get("general.alignment", "uint32"))

        infos: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            info = header.tensor_info()
            if info.name in infos:
                raise ValueError(f"the tensor {_short(info.name)} comes twice")
            infos[info.name] = info
        self.tensors = _placed(infos, _padded(header.at, self.alignment), self.alignment, len(self._data))


class _Header:
    """A cursor over the bytes before the tensors. What it is asked for, it first checks to be there."""

    def __init__(self, data: np.ndarray):
        self.size = min(len(data), _LONGEST_HEADER)
        self.is_cut = self.size < len(data)
        self.view = memoryview(data)[: self.size]
        self.at = 0

    def start(self) -> tuple[int, int, int]:
        """Version, number of tensors, number of metadata pairs."""
        magic = bytes(self.view[self.take(4, "the magic")])
        if magic != MAGIC:
            raise ValueError(f"it starts with {magic!r}, not {MAGIC!r}")
        version = self.number(_UINT32, "the version")
        if version in (2 << 24, 3 << 24):
            raise ValueError("it is big endian, and only little-endian files are read")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and versions 2 and 3 are read")
        num_tensors = self.number(_UINT64, "the number of tensors")
        num_pairs = self.number(_UINT64, "the number of metadata pairs")
        for count, smallest, what in ((num_pairs, 13, "metadata pairs"), (num_tensors, 24, "tensors")):
            self.check_room(count, smallest, what)
            if count > _MOST_ENTRIES:
                raise ValueError(f"it announces {count} {what}, and {_MOST_ENTRIES} are allowed")
        return version, num_tensors, num_pairs

    def take(self, size: int, what: str) -> slice:
        """The next `size` bytes, as a slice of the view."""
        start, end = self.at, self.at + size
        if end > self.size:
            raise ValueError(f"{what} at byte {start} takes {size} bytes, and {self.left(start)}")
        self.at = end
        return slice(start, end)

    def check_room(self, count: int, smallest: int, what: str) -> None:
        """Refuse a count of things that could not fit even if each took its smallest size."""
        if count * smallest > self.size - self.at:
            raise ValueError(f"it announces {count} {what} at byte {self.at}, and {self.left(self.at)}")

    def left(self, at: int) -> str:
        end = f"a header, of at most {_LONGEST_HEADER} bytes," if self.is_cut else "the file"
        return f"{end} has {self.size - at} left"

    def number(self, packer: struct.Struct, what: str) -> int | float | bool:
        return packer.unpack(self.view[self.take(packer.size, what)])[0]

    def string(self, what: str, longest: int = _LONGEST_HEADER) -> str:
        length = self.number(_UINT64, what)
        if length > longest:
            raise ValueError(f"{what} at byte {self.at} has {length} bytes, and {longest} are allowed")
        place = self.take(length, what)
        try:
            return str(self.view[place], "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} at byte {place.start} is not UTF-8: {error.reason}") from None

    def value(self, code: int) -> tuple[str | list, object]:
        """The type of a metadata value as a name, and the value."""
        if code == _STRING:
            return "string", self.string("a string")
        if code == _ARRAY:
            return self.array(1)
        if code not in _SCALARS:
            raise ValueError(f"the value at byte {self.at} has the type {code}, which does not exist")
        name, _ = _SCALARS[code]
        if name == "bool":
            return name, _to_bools(self.raw(1, "a bool"))[0]
        return name, self.number(_PACKERS[code], "a number")

    def raw(self, size: int, what: str) -> np.ndarray:
        return np.frombuffer(self.view[self.take(size, what)], dtype=np.uint8)

    def array(self, depth: int) -> tuple[str | list, list]:
        if depth > _DEEPEST_ARRAY:
            raise ValueError(f"arrays are nested more than {_DEEPEST_ARRAY} deep at byte {self.at}")
        code = self.number(_UINT32, "the type of an array")
        count = self.number(_UINT64, "the length of an array")
        if code not in _SMALLEST:
            raise ValueError(f"the array at byte {self.at} has the type {code}, which does not exist")
        self.check_room(count, _SMALLEST[code], "elements of an array")
        if code == _STRING:
            return "array[string]", [self.string("a string") for _ in range(count)]
        if code == _ARRAY:
            pairs = [self.array(depth + 1) for _ in range(count)]
            return [type_ for type_, _ in pairs], [value for _, value in pairs]
        name, letter = _SCALARS[code]
        raw = self.raw(count * _SMALLEST[code], "an array")
        return f"array[{name}]", _to_bools(raw) if name == "bool" else raw.view(f"<{letter}").tolist()

    def tensor_info(self) -> TensorInfo:
        """The next tensor's description, its offset still counted from where the tensors begin."""
        name = self.string("a tensor's name", _LONGEST_KEY)
        num_dims = self.number(_UINT32, "the number of dimensions")
        if num_dims > _MOST_DIMENSIONS:
            raise ValueError(
                f"the tensor {_short(name)} has {num_dims} dimensions, and {_MOST_DIMENSIONS} are allowed"
            )
        dims = struct.unpack(f"<{num_dims}Q", self.view[self.take(8 * num_dims, "the dimensions")])
        code = self.number(_UINT32, "the type of a tensor")
        offset = self.number(_UINT64, "the offset of a tensor")
        if code not in _TENSOR_TYPES:
            raise ValueError(f"the tensor {_short(name)} has the type {code}, which does not exist")
        shape, type_ = tuple(reversed(dims)), _TENSOR_TYPES[code]
        return TensorInfo(name, shape, type_, offset, _count_bytes(name, shape, type_))


def write_gguf(path, metadata: Mapping[str, object], tensors: Mapping[str, object], *, types=None) -> None:
    """Write a GGUF file, version 3, in one atomic step: a failure leaves the old file as it was.

    Args:
        metadata: key → bool, int, float, str, or a list of one of these or of lists. "general.alignment"
            sets the alignment.
        tensors: name → a torch.Tensor, stored as it is (F32, F16, BF16, F64, I8, I16, I32, I64), or a triple
            (raw, type, shape) as `companion.quantize.blocks.quantise` makes raw and `dequantise` takes it.
        types: key → type, as in `GGUFFile.types`, where the usual one will not do. Without it a bool is
            "bool", a str "string", a float "float32" (and rounded to it); an int takes the first type that
            holds it of uint32, int32, uint64, int64, in a list of int32, uint32, int64, uint64 (uint32 alone
            and int32 in lists are what llama.cpp's converters write). An empty list needs its type.

    Raises TypeError or ValueError, naming the key or the tensor, before anything is written. The tensors and
    the whole file are in memory at once.
    """
    types = {} if types is None else types
    for what, given in (("metadata", metadata), ("tensors", tensors), ("types", types)):
        if not isinstance(given, Mapping):
            raise TypeError(f"{what} must be a mapping, got {type(given).__name__}")
        if len(given) > _MOST_ENTRIES:
            raise ValueError(f"{what} must have at most {_MOST_ENTRIES} entries, got {len(given)}")
    if extra := types.keys() - metadata.keys():
        raise ValueError(f"types names keys that are not in metadata: {sorted(map(str, extra))}")
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    _check_alignment(alignment, types.get("general.alignment", "uint32"))

    pieces = [MAGIC, _UINT32.pack(3), _UINT64.pack(len(tensors)), _UINT64.pack(len(metadata))]
    for key, value in metadata.items():
        pieces.append(_encode_string(f"the key {key!r}", key, _LONGEST_KEY))
        what = f"metadata[{key!r}]"
        type_ = types[key] if key in types else _usual_type(what, value)
        pieces.append(_encode_typed(what, value, type_))
    contents, offset = [], 0
    for name, tensor in tensors.items():
        raw, type_, shape = _as_bytes(name, tensor)
        pieces.append(_encode_string(f"the tensor's name {name!r}", name, _LONGEST_TENSOR_NAME))
        pieces.append(struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        pieces.append(struct.pack("<IQ", _TENSOR_CODES[type_], offset))
        contents += [raw, bytes(_padded(len(raw), alignment) - len(raw))]
        offset += _padded(len(raw), alignment)
    size = sum(map(len, pieces))
    if size > _LONGEST_HEADER:
        raise ValueError(f"metadata and names take {size} bytes, and {_LONGEST_HEADER} are allowed")
    pieces.append(bytes(_padded(size, alignment) - size))
    atomic_write(path, b"".join(pieces + contents))


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _short(name: str) -> str:
    return repr(name if len(name) <= 64 else name[:61] + "…")


def _check_alignment(alignment: object, type_: object) -> None:
    if type_ != "uint32" or type(alignment) is not int:
        raise ValueError(
            f"general.alignment must be a uint32, got {type_ if isinstance(type_, str) else 'a list'}"
        )
    if not 8 <= alignment < 2**32 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two of at least 8, got {alignment}")


def _to_bools(raw: np.ndarray) -> list[bool]:
    if raw.max(initial=0) > 1:
        raise ValueError(f"a bool must be 0 or 1, got {raw.max()}")
    return raw.astype(bool).tolist()


def _count_bytes(name: str, shape: tuple[int, ...], type_: str) -> int:
    """The bytes of a tensor; its rows, the last dimension, must be whole blocks."""
    if math.prod(max(size, 1) for size in shape) > _MOST_ELEMENTS:  # a size of 0 hides no absurd one
        raise ValueError(f"the tensor {_short(name)} has the shape {shape}: more than 2^60 elements")
    block, nbytes = _SIZES[type_]
    if (shape[-1] if shape else 1) % block:
        raise ValueError(
            f"the tensor {_short(name)} has the shape {shape}: {type_} takes rows of whole {block}s"
        )
    return math.prod(shape) // block * nbytes


def _placed(infos: dict[str, TensorInfo], start: int, alignment: int, size: int) -> dict[str, TensorInfo]:
    """The descriptions with offsets from the file's start: aligned, inside the file, and apart."""
    placed = {}
    for name, info in infos.items():
        if info.offset % alignment:
            raise ValueError(
                f"the tensor {_short(name)} has the offset {info.offset}, no multiple of {alignment}"
            )
        if start + info.offset + info.nbytes > size:
            raise ValueError(
                f"the tensor {_short(name)} takes {info.nbytes} bytes from byte {start + info.offset} on, "
                f"and the file has {size}"
            )
        placed[name] = TensorInfo(name, info.shape, info.type, start + info.offset, info.nbytes)
    filled = sorted((info for info in placed.values() if info.nbytes), key=lambda info: info.offset)
    for before, after in zip(filled, filled[1:], strict=False):
        if before.offset + before.nbytes > after.offset:
            raise ValueError(f"the tensors {_short(before.name)} and {_short(after.name)} overlap")
    return placed


def _usual_type(what: str, value: object, depth: int = 0) -> str | list:
    """The type that llama.cpp's converters give such a value."""
    if not isinstance(value, (list, tuple)):
        return _usual_scalar(what, [value], ("uint32", "int32", "uint64", "int64"))
    if depth == _DEEPEST_ARRAY:
        raise ValueError(f"{what} nests lists more than {_DEEPEST_ARRAY} deep")
    if not value:
        raise ValueError(f"{what} is an empty list: give its type in types, such as 'array[string]'")
    if all(isinstance(item, (list, tuple)) for item in value):
        return [_usual_type(what, item, depth + 1) for item in value]
    return f"array[{_usual_scalar(what, value, ('int32', 'uint32', 'int64', 'uint64'))}]"


def _usual_scalar(what: str, values: list | tuple, integers: tuple[str, ...]) -> str:
    kinds = {type(value) for value in values}
    if kinds == {bool}:
        return "bool"
    if kinds == {str}:
        return "string"
    if kinds == {int}:
        low, high = min(values), max(values)
        for name in integers:
            if _bounds(name)[0] <= low and high <= _bounds(name)[1]:
                return name
        raise ValueError(f"{what} lies outside every integer type of 64 bits")
    if kinds <= {int, float}:
        return "float32"
    raise TypeError(
        f"{what} must be a bool, int, float or str, or a list of one of them, "
        f"got {', '.join(sorted(kind.__name__ for kind in kinds))}"
    )


def _bounds(name: str) -> tuple[int, int]:
    bits = 8 * _SMALLEST[_CODES[name]]
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _encode_typed(what: str, value: object, type_: object) -> bytes:
    """The code of the type, then the value."""
    if isinstance(type_, str) and type_ in _CODES:
        return _UINT32.pack(_CODES[type_]) + _encode(what, [value], type_)
    return _UINT32.pack(_ARRAY) + _encode_array(what, value, type_)


def _encode_array(what: str, value: object, type_: object, depth: int = 1) -> bytes:
    """The elements' type, their number, the elements."""
    element = type_[6:-1] if isinstance(type_, str) and type_[:6] + type_[-1:] == "array[]" else None
    if not isinstance(type_, list) and element not in _CODES:
        raise ValueError(f"the type of {what} must be one of {', '.join(_CODES)}, or array[…], got {type_!r}")
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{what} must be a list for the type {type_!r}, got {type(value).__name__}")
    if element:
        return struct.pack("<IQ", _CODES[element], len(value)) + _encode(what, value, element)
    if len(type_) != len(value):
        raise ValueError(f"{what} holds {len(value)} lists, and its type {len(type_)}")
    if value and depth == _DEEPEST_ARRAY:
        raise ValueError(f"{what} nests lists more than {_DEEPEST_ARRAY} deep")
    inner = [_encode_array(what, *pair, depth + 1) for pair in zip(value, type_, strict=True)]
    return struct.pack("<IQ", _ARRAY, len(value)) + b"".join(inner)


def _encode(what: str, values: list | tuple, name: str) -> bytes:
    """Scalars or strings, one after the other."""
    if name == "string":
        return b"".join(_encode_string(what, value, _LONGEST_HEADER) for value in values)
    allowed = {"bool": {bool}, "float32": {int, float}, "float64": {int, float}}.get(name, {int})
    if wrong := {type(value) for value in values} - allowed:
        raise TypeError(f"{what} must hold {name}, got {', '.join(sorted(kind.__name__ for kind in wrong))}")
    try:
        return struct.pack(f"<{len(values)}{_SCALARS[_CODES[name]][1]}", *values)
    except (struct.error, OverflowError):
        raise ValueError(f"{what} holds a number that does not fit into {name}") from None


def _encode_string(what: str, text: object, longest: int) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"{what} must be a str, got {type(text).__name__}")
    try:
        encoded = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} cannot be written in UTF-8: {error.reason}") from None
    if len(encoded) > longest:
        raise ValueError(f"{what} has {len(encoded)} bytes, and {longest} are allowed")
    return _UINT64.pack(len(encoded)) + encoded


def _as_bytes(name: object, tensor: object) -> tuple[np.ndarray, str, tuple[int, ...]]:
    """A tensor's bytes, type and shape."""
    what = f"tensors[{name!r}]"
    if isinstance(tensor, Tensor):
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(map(str, _DTYPES))
            raise TypeError(f"{what} must have one of the dtypes {allowed}, got {tensor.dtype}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        raw, type_, shape = flat.view(torch.uint8).numpy(), _DTYPES[tensor.dtype], tuple(tensor.shape)
    elif isinstance(tensor, tuple) and len(tensor) == 3:
        raw, type_, shape = tensor
        check_choice(f"the type of {what}", type_, tuple(_TENSOR_CODES))
        if not isinstance(raw, np.ndarray) or raw.dtype != np.uint8:
            raise TypeError(f"the bytes of {what} must be a numpy array of uint8")
        if not isinstance(shape, (tuple, list)) or not all(type(size) is int for size in shape):
            raise TypeError(f"the shape of {what} must be a tuple of ints, got {shape!r}")
        raw, shape = np.ascontiguousarray(raw).reshape(-1), tuple(shape)
    else:
        raise TypeError(f"{what} must be a torch.Tensor or (raw, type, shape), got {type(tensor).__name__}")
    if len(shape) > _MOST_DIMENSIONS or min(shape, default=0) < 0:
        raise ValueError(f"{what} must have at most {_MOST_DIMENSIONS} sizes, none negative, got {shape}")
    if len(raw) != (needed := _count_bytes(str(name), shape, type_)):
        raise ValueError(f"{what}, {type_} of shape {shape}, must have {needed} bytes, got {len(raw)}")
    return raw, type_, shape
