"""A bundle: a replica's executables in a folder, with a manifest that says what they were compiled for.

`jaxserve compile` writes one, `jaxserve serve --bundle` loads it instead of compiling. An executable runs only where
everything it was compiled for is the same, so every fact that shaped it stands in the manifest and is compared; what
differs is named. Loading an executable can run any code, so files are read only if their checksums are the manifest's,
and a manifest can be signed with a key that both sides hold (HMAC-SHA256). Without a key a bundle is as trustworthy as
the folder it lies in.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

from jaxserve.core.config import SHAPE_SETTINGS, ServeConfig
from jaxserve.core.errors import ConfigError
from jaxserve.core.json_file import MAX_DEPTH, nested_deeper
from jaxserve.core.regular_file import read_regular
from jaxserve.engine.programs import Key, Replica, programs
from jaxserve.launch.origin import FORMAT, Origin, cpu_features, spec_digest
from jaxserve.models.spec import ModelSpec

MANIFEST = "manifest.json"
SIGNATURE = "manifest.sig"
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_KEY_BYTES = 1 << 16

ALWAYS_SET = frozenset(SHAPE_SETTINGS) - {"quantization", "attention", "memory_fraction"}
"""Settings of which every bundle has one."""

_ANEW = "Compile it anew with `jaxserve compile`."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One executable of a bundle.

    Attributes:
        name: The program.
        bucket: Its size, 0 if it has one only.
        file: Name of its file.
        num_bytes: Size of the file.
        sha256: Checksum of the file.
    """

    name: str
    bucket: int
    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """A bundle whose manifest has been read.

    Attributes:
        folder: Where it is.
        topology: What it was compiled for, as it was named.
        origin: What must be the same here.
        settings: Settings of serve that shaped it, as text.
        cpu_features: What the compiling host's processor could do, empty for other devices.
        entries: Its executables.
    """

    folder: Path
    topology: str
    origin: Origin
    settings: Mapping[str, str]
    cpu_features: tuple[str, ...]
    entries: tuple[Entry, ...]

    def adopt(self, config: ServeConfig) -> ServeConfig:
        """A configuration with the bundle's settings where it leaves them open.

        Raises:
            ConfigError: It asks for something else than the bundle was compiled for.
        """
        parsers = {setting.name: setting.metadata["parse"] for setting in fields(ServeConfig)}
        # Open is what is the default itself: a mesh of one device that was asked for only equals it.
        asked_for = {each.name for each in fields(ServeConfig) if vars(config)[each.name] is not each.default}
        adopted: dict[str, Any] = {}
        wrong = []
        for name, text in self.settings.items():
            value = parsers[name](text)
            asked = vars(config)[name]
            if name in asked_for and asked != value:
                wrong.append(f"{name} {text} (asked for {asked})")
            adopted[name] = value
        # A replica that was compiled with a setting left open is not the one that is asked for with it.
        wrong += [
            f"{name} left open (asked for {vars(config)[name]})"
            for name in ("quantization", "attention", "memory_fraction")
            if name not in self.settings and name in asked_for
        ]
        self._refuse(wrong)
        return replace(config, **adopted)

    def require(self, spec: ModelSpec, mesh: Mesh) -> None:
        """Makes sure that the bundle is whole and for a model and a kind of device, before weights are loaded for it.

        Raises:
            ConfigError: It is for others, or a file is missing or damaged.
        """
        self._refuse(self.origin.differences(device_kind=mesh.devices.flat[0].device_kind, model=spec_digest(spec)))
        for entry in self.entries:
            self._checked(entry)

    def load(
        self,
        replica: Replica,
        config: ServeConfig,
        *,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> dict[Key, Any]:
        """The executables, ready to run on the replica's devices.

        Args:
            replica: What is to be run.
            config: What was asked for.
            progress: Called with ("load programs", done, total) after each.

        Raises:
            ConfigError: The bundle was compiled for something else, or is damaged.
        """
        missing = sorted(set(self.cpu_features) - set(cpu_features(replica)))
        wrong = self.origin.differences(**vars(Origin.of(replica, config)))
        self._refuse([*wrong, *([f"a processor with {', '.join(missing)}"] if missing else [])])
        absent = sorted({each.key for each in programs(replica)} - {(each.name, each.bucket) for each in self.entries})
        if absent:
            raise ConfigError(
                f"{self.folder} lacks programs: {', '.join(f'{name} {bucket}' for name, bucket in absent)}. {_ANEW}",
                param="bundle",
            )
        devices = list(replica.mesh.devices.flat)
        loaded = {}
        for done, entry in enumerate(self.entries, start=1):
            loaded[entry.name, entry.bucket] = self._loaded(entry, devices)
            if progress is not None:
                progress("load programs", done, len(self.entries))
        return loaded

    def _loaded(self, entry: Entry, devices: list[jax.Device]) -> jax.stages.Compiled:
        """An executable, ready to run on some devices."""
        content = self._checked(entry)
        try:
            payload, in_tree, out_tree = pickle.loads(content)
            loaded: jax.stages.Compiled = deserialize_and_load(
                payload, in_tree, out_tree, backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:  # unpickling and the compilers raise what they like
            reason = str(error).strip().splitlines()
            raise ConfigError(
                f"Cannot load {self.folder / entry.file} ({type(error).__name__}{': ' + reason[0] if reason else ''}), "
                f"though it is as it was written. {_ANEW}",
                param="bundle",
            ) from error
        return loaded

    def _checked(self, entry: Entry) -> bytes:
        """A file's content, if it is what was written."""
        path = self.folder / entry.file
        try:
            content = read_regular(path, max_bytes=entry.num_bytes)
        except OSError as error:
            raise ConfigError(f"Cannot read {path}: {error.strerror}. {_ANEW}", param="bundle") from error
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise ConfigError(f"{path} is damaged: its checksum is not the manifest's. {_ANEW}", param="bundle")
        return content

    def _refuse(self, wrong: list[str]) -> None:
        if wrong:
            raise ConfigError(
                f"The bundle {self.folder} was compiled for {'; '.join(wrong)}. Compile it anew with `jaxserve "
                "compile`, or serve without --bundle.",
                param="bundle",
            )


def require_place(out: Path) -> None:
    """Makes sure that a bundle may be written to a place.

    Raises:
        ConfigError: There is something that is no bundle, it is a link or no name, or nothing can be written there.
    """
    if out.is_symlink() or out.name in ("", ".."):
        raise ConfigError(
            f"{str(out)!r} must name the bundle's own folder, no link to it; choose another.", param="out"
        )
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is there already and is no bundle; choose another folder.", param="out")
    with _folder_beside(out):
        pass


@contextmanager
def _folder_beside(out: Path) -> Iterator[Path]:
    """A folder for a while, on the file system that a bundle is to be on.

    Raises:
        ConfigError: It cannot be made or written to.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as made:
            yield Path(made)
    except OSError as error:
        raise ConfigError(f"Cannot write a bundle to {out}: {error.strerror or error}.", param="out") from error


def write_bundle(
    out: Path,
    compiled: Mapping[Key, jax.stages.Compiled],
    *,
    topology: str,
    origin: Origin,
    settings: Mapping[str, str],
    features: tuple[str, ...] = (),
    key: bytes | None = None,
) -> int:
    """Writes a bundle; the folder appears complete or not at all.

    Args:
        out: The folder; one that is there is replaced if it is a bundle.
        compiled: The executables.
        topology: As it was named.
        origin: What they were compiled for.
        settings: Settings of serve that shaped them, as text.
        features: From `cpu_features`.
        key: Signs the manifest.

    Returns:
        The bytes written.

    Raises:
        ConfigError: There is something else in that place, or it cannot be written to.
    """
    require_place(out)
    with _folder_beside(out) as made:
        folder = made / "bundle"
        folder.mkdir()
        entries = [_write_entry(folder, program, executable) for program, executable in compiled.items()]
        manifest = {
            "topology": topology,
            "origin": asdict(origin),
            "settings": dict(settings),
            "cpu_features": list(features),
            "entries": [asdict(entry) for entry in entries],
        }
        text = json.dumps(manifest, indent=1).encode()
        (folder / MANIFEST).write_bytes(text)
        if key is not None:
            (folder / SIGNATURE).write_text(_signature(text, key))
        if out.exists():
            shutil.move(out, made / "former")
        folder.rename(out)
    return sum(entry.num_bytes for entry in entries)


def serialized(executable: jax.stages.Compiled) -> bytes:
    """An executable as a bundle stores it."""
    return pickle.dumps(serialize(executable))


def _write_entry(folder: Path, program: Key, executable: jax.stages.Compiled) -> Entry:
    name, bucket = program
    content = serialized(executable)
    file = _file_name(name, bucket)
    (folder / file).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    return Entry(name=name, bucket=bucket, file=file, num_bytes=len(content), sha256=digest)


def _file_name(name: str, bucket: int) -> str:
    return f"{name}-{bucket}.bin"


def open_bundle(folder: Path, key: bytes | None = None) -> Bundle:
    """Reads a bundle's manifest; no executable is touched.

    Args:
        folder: The bundle.
        key: What its manifest must be signed with, or None to ask for no signature; one that is there is then not
            checked, and a warning says so.

    Raises:
        ConfigError: It is no bundle, of another format, or not signed with this key.
    """
    try:
        text = read_regular(folder / MANIFEST, max_bytes=_MAX_MANIFEST_BYTES)
        signature = read_regular(folder / SIGNATURE, max_bytes=_MAX_KEY_BYTES) if key is not None else b""
    except OSError as error:
        what = "no signature" if error.filename and Path(error.filename).name == SIGNATURE else "no bundle"
        raise ConfigError(
            f"{folder} has {what}: cannot read {error.filename} ({error.strerror}).", param="bundle"
        ) from (error)
    if key is not None and not hmac.compare_digest(signature.strip(), _signature(text, key).encode()):
        raise ConfigError(
            f"{folder} is not signed with the key given: pass the one of `jaxserve compile --key`, or compile it anew "
            "with this one.",
            param="bundle_key",
        )
    if key is None and (folder / SIGNATURE).exists():
        logger.warning("%s is signed, but no bundle key is given: its signature is not checked", folder)
    try:
        manifest = json.loads(text)
        if nested_deeper(manifest, MAX_DEPTH):
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        return _bundle(folder, manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}).", param="bundle"
        ) from error


def _bundle(folder: Path, manifest: Mapping[str, Any]) -> Bundle:
    """A bundle as its manifest says; wrong content raises whatever it may."""
    origin = manifest["origin"]
    if origin["format"] != FORMAT:
        raise ConfigError(f"{folder} is a bundle of format {origin['format']}, not {FORMAT}. {_ANEW}", param="bundle")
    for name in ("flags", "jax_settings", "token_buckets", "seq_buckets"):
        origin[name] = tuple(origin[name])
    parsers = {setting.name: setting.metadata["parse"] for setting in fields(ServeConfig)}
    settings = manifest["settings"]
    if not ALWAYS_SET <= set(settings) <= set(SHAPE_SETTINGS):
        wrong = (ALWAYS_SET - set(settings)) | (set(settings) - set(SHAPE_SETTINGS))
        raise ValueError(f"wrong settings: {', '.join(sorted(wrong))}")
    for name, value in settings.items():
        parsers[name](value)
    entries = tuple(Entry(**entry) for entry in manifest["entries"])
    for entry in entries:
        if not (isinstance(entry.num_bytes, int) and entry.num_bytes >= 0 and isinstance(entry.sha256, str)):
            raise ValueError(f"the size or the checksum of {entry.file!r:.80} is none")
        if entry.file != _file_name(entry.name, entry.bucket):
            raise ValueError(f"{entry.file} is not where {entry.name} {entry.bucket} would be")
    return Bundle(
        folder=folder,
        topology=manifest["topology"],
        origin=Origin(**origin),
        settings=settings,
        cpu_features=tuple(manifest["cpu_features"]),
        entries=entries,
    )


def read_key(path: Path | None) -> bytes | None:
    """The content of a key file without the white space around it; None without a file.

    Raises:
        ConfigError: It cannot be read or is empty.
    """
    if path is None:
        return None
    try:
        key = read_regular(path, max_bytes=_MAX_KEY_BYTES).strip()
    except OSError as error:
        raise ConfigError(f"Cannot read the key {path}: {error.strerror}.", param="bundle_key") from error
    if not key:
        raise ConfigError(f"The key {path} is empty.", param="bundle_key")
    return key


def _signature(text: bytes, key: bytes) -> str:
    return hmac.new(key, text, hashlib.sha256).hexdigest()
