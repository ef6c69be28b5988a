"""Files that can be trusted: safetensors and JSON, written whole or not at all, checked before a byte is believed.

The format is safetensors (https://github.com/huggingface/safetensors): 8 bytes of header length, a JSON header of
names, dtypes, shapes and offsets, then the numbers. The library reads files with duplicate names, paths for names and
flipped bits without a word, and maps the file, so that a later truncation kills the process; hence a reader of its own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from .errors import DataError, ResourceError, StatewiseError, UsageError
from .state import leaves, names, tree_map

if TYPE_CHECKING:
    from .layer import RecurrentLayer

HEADER_LIMIT = 10_000_000  # bytes of header
RANK_LIMIT = 16
NAME_LIMIT = 256
JSON_LIMIT = 1_000_000  # bytes of a configuration
DEPTH_LIMIT = 32
STATE_FORMAT = 1
FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
NO_LINK = getattr(os, "O_NOFOLLOW", 0)  # refuse a symbolic link as the last part of a path

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_FOREIGN = [
    (b"\x80", "a pickle"),
    (b"(", "a pickle"),
    (b"PK\x03\x04", "a zip archive (.pt, .pth, .npz)"),
    (b"GGUF", "a GGUF file"),
    (b"7z\xbc\xaf", "a 7z archive"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file"),
]


def shown(path: str | os.PathLike[str]) -> str:
    """A path as text that any terminal or log takes, whatever bytes it is made of."""
    return os.fspath(path).encode("utf-8", "backslashreplace").decode().replace("\n", "\\n")


# ---- writing


def write_synced(path: Path, chunks: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Create a file that must not exist, write, fsync; returns its size and SHA-256. The mode follows the umask."""
    digest, size = hashlib.sha256(), 0
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | FLAGS | NO_LINK, 0o666)
    try:
        for chunk in chunks:
            digest.update(chunk)
            view = memoryview(chunk)
            while len(view):
                view = view[os.write(fd, view) :]
            size += len(chunk)
        os.fsync(fd)
    finally:
        os.close(fd)
    return size, digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    if os.name == "nt":  # no such call there
        return
    fd = os.open(path, os.O_RDONLY | FLAGS)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: str | os.PathLike[str], chunks: Iterable[bytes | memoryview], size: int = 0) -> None:
    """Write beside, fsync, rename, fsync the directory: a reader sees the old file or the new one, never a part.

    size is how many bytes are coming, for the message when they do not fit.

    Raises ResourceError when the disk is full or fails, DataError when the place cannot be written. No litter stays.
    """
    path = Path(path)
    beside = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        write_synced(beside, chunks)
        os.replace(beside, path)
        sync_directory(path.parent)
    except OSError as error:
        raise write_error(path, error, size) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise DataError now where `replace_file` would after long work: for a folder, or a place that takes no file."""
    path = Path(path)
    fault = errno.EISDIR if path.is_dir() else 0 if path.parent.is_dir() else errno.ENOENT
    if not fault and not os.access(path.parent, os.W_OK):
        fault = errno.EACCES
    if fault:
        raise write_error(path, OSError(fault, os.strerror(fault)))


def write_json(path: str | os.PathLike[str], record: Mapping[str, Any]) -> None:
    """A JSON file, replaced whole."""
    replace_file(path, [json_bytes(record)])


def json_bytes(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, indent=1, allow_nan=False).encode() + b"\n"


def write_error(path: Path, error: OSError, size: int = 0) -> StatewiseError:
    """What an OSError on writing means to the user."""
    if error.errno in (
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    ):
        return DataError(f"cannot write {shown(path)}: {error.strerror}; working directory {shown(os.getcwd())}")
    free = "unknown"
    with contextlib.suppress(OSError):
        free = f"{shutil.disk_usage(path.parent).free:,}"
    needed = f"{size:,} bytes needed, " if size else ""
    return ResourceError(
        f"cannot write {shown(path)}: {error.strerror}; {needed}{free} bytes free; what was there is intact"
    )


def write_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file, replaced whole, with a SHA-256 of each tensor and of the metadata in its header.

    Raises UsageError for names or dtypes that the reader would refuse; ResourceError and DataError as `replace_file`.
    """
    replace_file(path, tensor_chunks(tensors, metadata), sum(t.numel() * t.element_size() for t in tensors.values()))


def tensor_chunks(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece, so that the whole is never in memory twice."""
    metadata = dict(metadata or {})
    doubles = [name for name, t in tensors.items() if t.dtype == torch.complex128]
    if doubles:  # the format has no complex128: pairs of float64, and a note
        metadata["complex128"] = json.dumps(doubles)
    header: dict[str, Any] = {}
    bodies, digests, end = [], {}, 0
    for name, t in tensors.items():
        fault = _name_fault(name)
        if fault:
            raise UsageError(f"cannot save tensor {name!a}: {fault}")
        t = torch.view_as_real(t.detach().resolve_conj()) if name in doubles else t.detach()
        if t.dtype not in _CODES or t.ndim > RANK_LIMIT:
            raise UsageError(f"cannot save tensor {name!a}: {t.dtype} of rank {t.ndim}; takes {', '.join(DTYPES)}")
        body = _bytes(t)
        start, end = end, end + len(body)
        header[name] = {"dtype": _CODES[t.dtype], "shape": list(t.shape), "data_offsets": [start, end]}
        digests[name] = _digest(_CODES[t.dtype], t.shape, body)
        bodies.append(body)
    digests[""] = _metadata_digest(metadata)
    header["__metadata__"] = {**metadata, "sha256": json.dumps(digests)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return iter([len(text).to_bytes(8, "little") + text, *bodies])


def _bytes(t: Tensor) -> memoryview:
    flat = t.resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    flat = flat if flat.stride() == (1,) else flat.clone(memory_format=torch.contiguous_format)  # one number of a slice
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def _digest(code: str, shape: Iterable[int], body: memoryview) -> str:
    digest = hashlib.sha256(f"{code}{list(shape)}".encode())
    digest.update(body)
    return digest.hexdigest()


def _metadata_digest(metadata: Mapping[str, str]) -> str:
    return hashlib.sha256(
        json.dumps({k: v for k, v in metadata.items() if k != "sha256"}, sort_keys=True).encode()
    ).hexdigest()


def _name_fault(name: str) -> str | None:
    if not name or len(name) > NAME_LIMIT:
        return f"a name has 1 to {NAME_LIMIT} characters, this one {len(name)}"
    if not name.isprintable() or ".." in name or name.startswith(("/", "\\")):
        return "a name has no control characters, no '..' and no leading slash"
    return None


# ---- reading


@contextlib.contextmanager
def open_checked(path: str | os.PathLike[str], *, follow: bool = True) -> Iterator[BinaryIO]:
    """A regular file, open for reading; never blocks on what is not one.

    follow=False refuses a symbolic link as the last part of the path.

    Raises DataError: missing, not a regular file, not readable, a link.
    """
    try:
        kind = os.stat(path, follow_symlinks=follow).st_mode
        if not stat.S_ISREG(kind):
            raise DataError(f"{shown(path)} is {_kind(kind)}; expected a file")
        fd = os.open(path, os.O_RDONLY | FLAGS | getattr(os, "O_NONBLOCK", 0) | (0 if follow else NO_LINK))
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise error if isinstance(error, DataError) else read_error(path, error) from error
    with open(fd, "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DataError(f"{shown(path)} changed while it was opened; expected a file")
        try:
            yield file  # type: ignore[misc]
        except OSError as error:
            raise error if isinstance(error, StatewiseError) else read_error(path, error) from error


def read_error(path: str | os.PathLike[str], error: Exception) -> DataError:
    """What an OSError on reading means to the user."""
    reason = getattr(error, "strerror", None) or error
    if isinstance(error, FileNotFoundError):
        return DataError(f"no such file: {shown(path)}; working directory {shown(os.getcwd())}")
    return DataError(f"cannot read {shown(path)}: {reason}")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISDIR: "a directory",
        stat.S_ISFIFO: "a FIFO",
        stat.S_ISSOCK: "a socket",
        stat.S_ISLNK: "a link",
        stat.S_ISCHR: "a character device",
        stat.S_ISBLK: "a block device",
    }
    return next((name for test, name in kinds.items() if test(mode)), "not a file")


def hash_file(path: Path, *, follow: bool = False) -> tuple[int, str]:
    """Size and SHA-256."""
    digest, size = hashlib.sha256(), 0
    with open_checked(path, follow=follow) as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def read_json(
    path: str | os.PathLike[str], *, limit: int = JSON_LIMIT, follow: bool = True, allow_nonfinite: bool = False
) -> dict[str, Any]:
    """A JSON object from a file. Raises DataError where there is no file to read, UsageError as `parse_json`."""
    with open_checked(path, follow=follow) as file:
        raw = file.read(limit + 1)
    return parse_json(raw, shown(path), limit=limit, allow_nonfinite=allow_nonfinite)


def parse_json(
    raw: bytes | str,
    where: str,
    *,
    limit: int = JSON_LIMIT,
    depth: int = DEPTH_LIMIT,
    allow_nonfinite: bool = False,
) -> dict[str, Any]:
    """A JSON object, refused when too long, too deep, with a name twice, or with NaN or infinity.

    allow_nonfinite: take NaN, Infinity and -Infinity, which other programs write.

    Raises UsageError with the line.
    """
    if len(raw) > limit:
        raise UsageError(f"{where}: longer than the limit of {limit:,} bytes")
    try:
        text = raw if isinstance(raw, str) else raw.decode("utf-8")
        _scan_json(text, where, depth)
        found = json.loads(text, parse_constant=float if allow_nonfinite else _refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}, line {error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{where}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"{where}: a JSON {type(found).__name__}; expected an object {{...}}")
    return found


# possessive, and content with the end of the text for a closing quote: linear on whatever comes
_TOKEN = re.compile(r'"(?:[^"\\]|\\.?)*+"?|[{}\[\]:,]', re.DOTALL)


def _scan_json(text: str, where: str, depth: int) -> None:
    """Refuse depth and duplicate names before anything recursive reads the text."""
    seen: list[set[str]] = []  # the names of every open object
    last = ""
    for token in _TOKEN.finditer(text):
        sign = token[0]
        if sign in "{[":
            seen.append(set())
            if len(seen) > depth:
                raise UsageError(f"{where}, line {_line(text, token.start())}: nested deeper than the limit of {depth}")
        elif sign in "}]":
            if seen:
                seen.pop()
        elif sign == ":" and seen and last:
            name = json.loads(last)
            if name in seen[-1]:
                raise UsageError(f"{where}, line {_line(text, token.start())}: {name[:80]!a} appears twice")
            seen[-1].add(name)
        last = sign if sign[0] == '"' else ""


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def read_tensors(
    path: str | os.PathLike[str],
    *,
    limit: int = 1 << 34,
    allow_nonfinite: bool = False,
    require_hashes: bool = False,
    follow: bool = True,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, copied into memory: what happens to the file later changes nothing.

    limit: bytes of file. allow_nonfinite: take NaN and infinity. require_hashes: refuse a file without our hashes.

    Raises DataError: not a file, not safetensors, truncated, inconsistent, a hash that does not match, NaN or infinity.
    """
    where = shown(path)
    with open_checked(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise DataError(f"{where}: {size:,} bytes; the limit is {limit:,}")
        header, start = _read_header(file, size, where)
        metadata = _metadata(header.pop("__metadata__", {}), where)
        layout = _layout(header, size - start, where)
        tensors = {name: _read_tensor(file, code, shape, where) for name, code, shape in layout}
    _verify(tensors, {name: code for name, code, _ in layout}, metadata, where, require_hashes)
    if not allow_nonfinite:
        for name, t in tensors.items():
            if (t.is_floating_point() or t.is_complex()) and not t.isfinite().all():
                bad = int((~t.isfinite()).sum())
                raise DataError(
                    f"{where}: tensor {name!r} holds {bad} values that are not finite; allow_nonfinite takes them"
                )
    for name in json.loads(metadata.get("complex128", "[]")):
        if name in tensors and tensors[name].dtype == torch.float64 and tensors[name].shape[-1:] == (2,):
            tensors[name] = torch.view_as_complex(tensors[name])
    return {name: tensors[name] for name in header}, metadata


def _read_header(file: BinaryIO, size: int, where: str) -> tuple[dict[str, Any], int]:
    if size < 8:
        raise DataError(f"{where}: empty or truncated: {size} bytes; expected a safetensors file")
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if length > HEADER_LIMIT:
        foreign = next((kind for magic, kind in _FOREIGN if head.startswith(magic)), None)
        if foreign:
            raise DataError(f"{where}: {foreign}, not a statewise checkpoint (safetensors); pickle is never loaded")
        raise DataError(f"{where}: bad header: {length:,} bytes long; the limit is {HEADER_LIMIT:,}")
    if 8 + length > size:
        raise DataError(f"{where}: truncated: the header ends at byte {8 + length:,}, the file at {size:,}")
    try:
        return parse_json(file.read(length), where, limit=HEADER_LIMIT, depth=4), 8 + length
    except UsageError as error:
        raise DataError(f"bad header: {error}") from None


def _metadata(found: Any, where: str) -> dict[str, str]:
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise DataError(f"{where}: bad header: metadata must map names to text")
    return found


def _layout(header: dict[str, Any], size: int, where: str) -> list[tuple[str, str, list[int]]]:
    """Name, dtype and shape in the order of the file; the tensors fill `size` bytes without hole or overlap."""
    found = []
    for name, entry in header.items():
        fault = _name_fault(name) or _entry_fault(entry)
        if fault:
            raise DataError(f"{where}: tensor {name[:80]!a}: {fault}")
        found.append((*entry["data_offsets"], name, entry["dtype"], entry["shape"]))
    end = 0
    for first, last, name, code, shape in sorted(found, key=lambda entry: entry[:2]):
        if first != end:
            what = "overlaps the one before" if first < end else "leaves a hole before it"
            raise DataError(f"{where}: tensor {name!r} {what}: it begins at byte {first}; expected {end}")
        wanted = math.prod(shape) * DTYPES[code].itemsize
        if last - first != wanted:
            raise DataError(
                f"{where}: tensor {name!r}: {code} {shape} takes {wanted} bytes; its offsets give {last - first}"
            )
        end = last
    if end != size:
        what = "truncated" if end > size else "trailing bytes"
        raise DataError(f"{where}: {what}: {size:,} bytes of tensors; the header says {end:,}")
    return [(name, code, shape) for _, _, name, code, shape in sorted(found, key=lambda entry: entry[:2])]


def _entry_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "expected dtype, shape and data_offsets"
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in DTYPES:
        return f"dtype {str(entry['dtype'])[:40]!a}; takes {', '.join(DTYPES)}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    for what, numbers in (("shape", shape), ("data_offsets", offsets)):
        if not isinstance(numbers, list) or not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
            return f"{what} is not a list of sizes"
    if len(shape) > RANK_LIMIT:
        return f"rank {len(shape)}; the limit is {RANK_LIMIT}"
    if math.prod(max(n, 1) for n in shape) >= 1 << 60:
        return f"shape {shape} overflows"
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"data_offsets {offsets}; expected [begin, end]"
    return None


def _read_tensor(file: BinaryIO, code: str, shape: list[int], where: str) -> Tensor:
    t = torch.empty(shape, dtype=DTYPES[code])
    if not t.numel():
        return t
    view = t.reshape(-1).view(torch.uint8).numpy().data
    while len(view):
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise DataError(f"{where}: the file became shorter while it was read")
        view = view[got:]
    if code == "BOOL" and int(t.view(torch.uint8).max()) > 1:
        raise DataError(f"{where}: a BOOL tensor holds bytes other than 0 and 1")
    return t


def _verify(
    tensors: dict[str, Tensor], codes: dict[str, str], metadata: dict[str, str], where: str, required: bool
) -> None:
    if "sha256" not in metadata:
        if required:
            raise DataError(f"{where}: no hashes in it; not written by statewise, or damaged")
        return
    try:
        digests = parse_json(metadata["sha256"], where, limit=HEADER_LIMIT)
    except UsageError as error:
        raise DataError(f"bad header: {error}") from None
    if set(digests) != {"", *tensors}:
        raise DataError(
            f"{where}: hash mismatch: the names of the tensors differ from those hashed; the file is damaged"
        )
    for name, t in tensors.items():
        if _digest(codes[name], t.shape, _bytes(t)) != digests[name]:
            raise DataError(f"{where}: hash mismatch in tensor {name!r}; the file is damaged")
    if _metadata_digest(metadata) != digests[""]:
        raise DataError(f"{where}: hash mismatch in the metadata; the file is damaged")


# ---- states


def parameter_hash(layer: torch.nn.Module) -> str:
    """SHA-256 of all parameters and buffers: states are worth something to these weights only."""
    digest = hashlib.sha256()
    for name, t in sorted(layer.state_dict().items()):
        digest.update(f"{name}{t.dtype}{list(t.shape)}".encode())
        digest.update(_bytes(t.detach()))
    return digest.hexdigest()


def save_state(
    path: str | os.PathLike[str], layer: RecurrentLayer[Any], state: Any, *, weights: bool = False, **extra: Any
) -> None:
    """Write a state with the fingerprint of its layer.

    weights: put a hash of the parameters in it, so that only these weights take it back. extra: JSON-able notes, found
    again by `read_tensors(path, allow_nonfinite=True)[1]["extra"]`.

    Raises UsageError for the state of another layer, which `load_state` would not take back.
    """
    fingerprint, wanted = _fingerprint(state), _fingerprint(layer.initial_state(0))
    if fingerprint != wanted:
        name = type(layer).__name__
        raise UsageError(f"save_state: the state {_brief(fingerprint)} is not that of {name}, {_brief(wanted)}")
    metadata = {
        "kind": "statewise state",
        "format": str(STATE_FORMAT),
        "layer": type(layer).__name__,
        "leaves": json.dumps(fingerprint),
        "extra": json.dumps(extra),
    }
    if weights:
        metadata["weights"] = parameter_hash(layer)
    write_tensors(path, dict(zip(names(state), leaves(state), strict=True)), metadata)


def load_state(path: str | os.PathLike[str], layer: RecurrentLayer[Any], *, limit: int = 1 << 34) -> Any:
    """The state that `save_state` wrote, on the device of the layer. Infinities are kept: a running maximum
    starts there.

    Raises DataError for a file that `read_tensors` refuses, a newer format, or the state of another layer.
    """
    where = shown(path)
    tensors, metadata = read_tensors(path, limit=limit, allow_nonfinite=True, require_hashes=True)
    if metadata.get("kind") != "statewise state":
        raise DataError(f"{where}: tensors, but not a saved state; expected a file of save_state")
    check_format(metadata.get("format"), STATE_FORMAT, where)
    like = layer.initial_state(0)
    saved, wanted = json.loads(metadata["leaves"]), json.loads(json.dumps(_fingerprint(like)))
    name = type(layer).__name__
    if metadata.get("layer") != name or saved != wanted:
        raise DataError(
            f"{where}: the state of {metadata.get('layer')} {_brief(saved)}; this layer is {name} {_brief(wanted)}"
        )
    if "weights" in metadata and metadata["weights"] != parameter_hash(layer):
        raise DataError(
            f"{where}: the state of a {name} with other weights (hash {metadata['weights'][:12]}); load those"
        )
    found = iter([tensors[key] for key in names(like)])
    state = tree_map(lambda leaf: next(found).to(leaf.device), like)
    rows = {len(leaf) for leaf in leaves(state)}
    if len(rows) > 1:
        raise DataError(f"{where}: its leaves have batches {sorted(rows)}; expected one")
    return state


def check_format(found: Any, ours: int, where: str) -> None:
    """Refuse a file from a newer version, or without one."""
    text = str(found)
    if not text.isdecimal() or len(text) > 9:
        raise DataError(f"{where}: format {text[:20]!a}; expected a number up to {ours}")
    if int(text) > ours:
        raise DataError(f"{where}: format {text}, this statewise reads up to {ours}; upgrade statewise")


def _fingerprint(state: Any) -> list[list[Any]]:
    return [
        [name, str(leaf.dtype).removeprefix("torch."), list(leaf.shape[1:])]
        for name, leaf in zip(names(state), leaves(state), strict=True)
    ]


def _brief(fingerprint: list[list[Any]]) -> str:
    text = ", ".join(f"{name} {dtype} {shape}" for name, dtype, shape in fingerprint)
    return f"({text if len(text) < 160 else text[:160] + ' ...'})"
