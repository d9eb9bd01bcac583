"""Reading a bundle: every check that needs no ONNX Runtime."""

from __future__ import annotations

import hashlib
import mmap
import os
import stat
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from secrets import token_hex

from offramp.bundle.json_text import from_json
from offramp.bundle.manifest import MANIFEST_FILE, File, Manifest
from offramp.errors import BundleError

_CALLS = 64  # about so many calls hash a file, each a part that is mapped meanwhile


def read(path: str | os.PathLike[str], *, verify: bool = True) -> tuple[Manifest, Path]:
    """The checked manifest of the bundle in directory ``path``, and that directory with its links resolved.

    Files that the manifest does not list are not looked at. ``verify=False`` leaves out the sha256 of the
    files (about 0.6 s per GB) and keeps all other checks.

    Raises:
        BundleError: there is no bundle; its manifest is wrong or too new; a file has an unsafe name, is a
            link, is missing, or is not what the manifest says.
    """
    if not isinstance(path, str | os.PathLike):
        raise BundleError(f"a {type(path).__name__} is no path of a bundle", hint="offramp.save writes one")
    root = Path(path).resolve()
    if not root.is_dir():
        raise BundleError(f"{os.fspath(path)} is not a directory", hint="offramp.save writes a bundle")
    text = _regular(root, MANIFEST_FILE)
    if text is not None:
        hint = "is this a bundle? offramp.save writes one" if "missing" in text else None
        raise BundleError(f"{os.fspath(path)}: {text}", hint=hint)
    try:
        manifest = from_json((root / MANIFEST_FILE).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"{MANIFEST_FILE} is not UTF-8: {error}") from error
    problems = [text for name, file in manifest.files.items() if (text := _wrong(root, name, file))]
    _usable(path, problems)
    if verify:
        verified(path, manifest, root, manifest.files)
    return manifest, root


def verified(path: str | os.PathLike[str], manifest: Manifest, root: Path, names: Collection[str]) -> None:
    """Compare the sha256 of some files with the manifest's.

    Raises:
        BundleError: one is not what the manifest says.
    """
    files = {name: file for name, file in manifest.files.items() if name in names}
    _usable(path, [text for name, file in files.items() if (text := _altered(root / name, file))])


def _usable(path: str | os.PathLike[str], problems: Sequence[str]) -> None:
    if problems:
        raise BundleError(f"the bundle {os.fspath(path)} cannot be used:\n  " + "\n  ".join(problems))


def _wrong(root: Path, name: str, file: File) -> str | None:
    """What is wrong with a listed file, its content aside."""
    parts = name.split("/")
    if not name or "\\" in name or ":" in name or "\0" in name or PurePosixPath(name).is_absolute():
        return f"unsafe file name {name!r}: a file is named relative to the bundle, with / between folders"
    if any(part in ("", ".", "..") for part in parts):
        return f"unsafe file name {name!r}: it could leave the bundle"
    for depth in range(1, len(parts) + 1):
        text = _regular(root, "/".join(parts[:depth]), folder=depth < len(parts))
        if text is not None:
            return text
    size = (root / name).stat().st_size
    if size != file.bytes:
        word = "truncated" if size < file.bytes else "too long"
        return f"{name} is {word}: it has {size} bytes, the manifest says {file.bytes}"
    return None


def _regular(root: Path, name: str, *, folder: bool = False) -> str | None:
    try:
        mode = (root / name).lstat().st_mode
    except (OSError, ValueError):
        return f"{name} is missing"
    if stat.S_ISLNK(mode):
        return f"{name} is a link; a bundle holds none (copy it with `cp -rL` to resolve links)"
    if not (stat.S_ISDIR(mode) if folder else stat.S_ISREG(mode)):
        return f"{name} is not a {'folder' if folder else 'file'}"
    return None


def _altered(path: Path, file: File) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    found = _sha256(path) if file.bytes else hashlib.sha256().hexdigest()
    if found != file.sha256.lower():
        return f"{path.name} was altered: sha256 {found[:12]}..., the manifest says {file.sha256[:12]}..."
    return None


def _sha256(path: Path) -> str:
    """In few calls, during which other threads run, even while ONNX Runtime keeps Python's lock for itself.

    What a call reads counts as the process's memory until it is unmapped: a small part of the file.
    """
    found, size = hashlib.sha256(), path.stat().st_size
    most = -(-size // (_CALLS * mmap.ALLOCATIONGRANULARITY)) * mmap.ALLOCATIONGRANULARITY
    with path.open("rb") as stream:
        for start in range(0, size, most):
            length = min(most, size - start)
            with mmap.mmap(stream.fileno(), length, access=mmap.ACCESS_READ, offset=start) as content:
                found.update(content)
    return found.hexdigest()


def write_whole(file: Path, text: str, mode: int) -> None:
    """Write a file in one step: it holds the text before or the new one, and nothing is left beside it."""
    part = file.with_name(f".{file.name}-{token_hex(8)}")
    try:
        part.write_text(text, encoding="utf-8")
        part.chmod(mode)
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
