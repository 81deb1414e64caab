"""Executables written by one process and loaded by another, which compiles nothing; and every reason to refuse them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.checkpoint.random_tokenizer import byte_tokenizer
from jaxserve.checkpoint.sources import load_spec, resolve_source, spec_of
from jaxserve.core.config import MeshShape, ServeConfig, load
from jaxserve.core.errors import ConfigError
from jaxserve.engine.programs import Key
from jaxserve.launch import origin
from jaxserve.launch.build import Model, build_engine, plan_replica
from jaxserve.launch.bundle import MANIFEST, Bundle, open_bundle, read_key, require_place, write_bundle
from jaxserve.launch.compile import compile_bundle
from jaxserve.launch.origin import Origin, compiler_flags, spec_digest
from jaxserve.models.spec import DynamicRopeScaling, LinearRopeScaling, YarnRopeScaling
from jaxserve.sharding.mesh import make_mesh

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "goldens" / "tiny" / "llama"
SHAPES = {"max_num_seqs": "4", "max_num_batched_tokens": "16", "num_pages": "32", "max_model_len": "64"}

BEGIN = """
import asyncio, json, sys
from pathlib import Path
from jax import monitoring
compiled = []
def listen(event, seconds, **given):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(given)
monitoring.register_event_duration_secs_listener(listen)
from jaxserve.checkpoint.random_tokenizer import byte_tokenizer
from jaxserve.checkpoint.sources import load_spec, resolve_source
from jaxserve.core.config import load
from jaxserve.engine.programs import Key
from jaxserve.launch import origin
from jaxserve.launch.build import Model, build_engine
from tiny_engine import generate_all, tokens_by_index
from engine_conformance import make_request
flags = json.loads(sys.argv[1])
source = resolve_source(flags["model"], cache_dir=Path("."))
spec = load_spec(source)
model = Model(source=source, spec=spec, tokenizer=byte_tokenizer(spec), chat_template=None, name="tiny")

async def main():
    engine = build_engine(load(flags, environ={}), model)
    requests = [make_request(f"r{i}", temperature=i % 2 / 1, seed=i, prompt=tuple(range(4, 10 + i))) for i in range(4)]
    results = await generate_all(engine, requests)
    stats = engine.stats()
    await engine.close()
    return [tokens_by_index(events)[0] for events in results], stats.num_compiles_after_ready

tokens, after = asyncio.run(main())
print(json.dumps({"tokens": tokens, "compiled": compiled, "after": after}))
"""


def begin(**flags: str) -> dict[str, Any]:
    """Serves the model in a process of its own."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "engine")]
    done = subprocess.run(
        [sys.executable, "-c", BEGIN, json.dumps({"model": str(MODEL), "compilation_cache": "false", **flags})],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed bundle, written by the command."""
    base = tmp_path_factory.mktemp("bundles")
    (base / "key").write_text("a secret\n")
    flags = [part for name, value in SHAPES.items() for part in (f"--{name.replace('_', '-')}", value)]
    command = [sys.executable, "-m", "jaxserve.cli", "compile", str(MODEL), "--out", str(base / "made"), *flags]
    done = subprocess.run(
        [*command, "--key", str(base / "key"), "--json"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    assert written["num_programs"] == len(list((base / "made").glob("*.bin")))
    assert sorted(path.name for path in base.iterdir()) == ["key", "made"], "nothing else is left behind"
    return base / "made"


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def load_here(bundle: Bundle, **settings: Any) -> int:
    """Loads a bundle for a replica planned here; the number of its programs."""
    config = replace(bundle.adopt(ServeConfig(model=str(MODEL))), **settings)
    mesh = make_mesh(tensor=config.mesh.tensor)
    replica, _ = plan_replica(config, spec_of(str(MODEL)), mesh)
    return len(bundle.load(replica, config))


def test_another_process_compiles_nothing_and_gives_the_same_tokens(folder: Path) -> None:
    loaded = begin(bundle=str(folder), bundle_key=str(folder.parent / "key"))
    assert loaded["compiled"] == []
    assert loaded["after"] == 0
    made = begin(**SHAPES)
    assert len(made["compiled"]) > 5
    assert loaded["tokens"] == made["tokens"]


def test_settings_left_open_are_the_bundles(folder: Path) -> None:
    bundle = open_bundle(folder)
    adopted = bundle.adopt(ServeConfig(model=str(MODEL), max_num_seqs=4))
    assert (adopted.num_pages, adopted.max_model_len, adopted.max_num_batched_tokens) == (32, 64, 16)
    assert load_here(bundle) == len(bundle.entries)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"page_size": 32}, r"page_size 16 \(asked for 32\)"),
        ({"mesh": MeshShape(tensor=2)}, r"mesh data=1,expert=1,tensor=1 \(asked for data=1,expert=1,tensor=2\)"),
        ({"quantization": "int8"}, r"quantization left open \(asked for int8\)"),
        ({"memory_fraction": 0.5}, r"memory_fraction left open"),
    ],
)
def test_other_settings_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"was compiled for {message}.* Compile it anew"):
        open_bundle(folder).adopt(ServeConfig(model=str(MODEL), **settings))


def test_one_device_that_was_asked_for_is_no_setting_left_open(folder: Path, tmp_path: Path) -> None:
    one = open_bundle(folder)
    two = replace(one, settings={**one.settings, "mesh": "tensor=2"})
    (tmp_path / "asked.yaml").write_text("mesh: {tensor: 1}\n")
    asked = (
        load({"mesh": "tensor=1"}, environ={}),
        load({}, environ={"JAXSERVE_MESH": "tensor=1"}),
        load({}, file=tmp_path / "asked.yaml", environ={}),
        ServeConfig(mesh=MeshShape()),
    )
    for config in asked:
        with pytest.raises(ConfigError, match=r"was compiled for mesh tensor=2 \(asked for data=1,expert=1,tensor=1\)"):
            two.adopt(config)
        assert one.adopt(config).mesh == MeshShape(tensor=1)
    for left_open in (load({}, environ={}), ServeConfig(), replace(ServeConfig(), port=1)):
        assert two.adopt(left_open).mesh == MeshShape(tensor=2)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("jax", "0.1", "jax 0.1"),
        ("jaxlib", "0.1", "jaxlib 0.1"),
        ("compiler", "0.0.1", "compiler 0.0.1"),
        ("code", "0", "jaxserve's sources 0"),
        ("flags", ("--xla_a=0", "--xla_b"), "compiler flags --xla_a=0,--xla_b (here none)"),
        ("places", "0,0,0/0 1,0,0/0", "devices at 0,0,0/0 1,0,0/0 (here None)"),
        ("device_kind", "TPU v6 lite", "device_kind TPU v6 lite (here cpu)"),
        ("model", "0", "another model, whose spec is 0"),
        ("mesh", {"tensor": 2}, "mesh tensor=2 (here data=1,expert=1,tensor=1)"),
        ("kv_dtype", "float8_e4m3fn", "kv_dtype float8_e4m3fn"),
        ("token_buckets", (1, 2), "token_buckets 1,2"),
    ],
)
def test_another_origin_is_refused_by_name(folder: Path, name: str, value: Any, words: str) -> None:
    bundle = open_bundle(folder)
    other = replace(bundle, origin=replace(bundle.origin, **{name: value}))
    with pytest.raises(ConfigError, match=f"was compiled for {re.escape(words)}"):
        load_here(other)


@pytest.mark.parametrize(
    ("name", "value"),
    [("jax_default_matmul_precision", "float32"), ("jax_enable_x64", True), ("jax_default_prng_impl", "rbg")],
)
def test_settings_of_jax_that_change_programs_are_refused_by_name(folder: Path, name: str, value: object) -> None:
    bundle, before = open_bundle(folder), jax.config.values[name]
    config = bundle.adopt(ServeConfig(model=str(MODEL)))
    replica, _ = plan_replica(config, spec_of(str(MODEL)), make_mesh())
    jax.config.update(name, value)
    try:
        with pytest.raises(ConfigError, match=rf"for JAX's settings {name}={before} \(here {name}={value}\)\. "):
            bundle.load(replica, config)
    finally:
        jax.config.update(name, before)


def test_what_compiles_is_known_by_package_and_version_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nightly builds of libtpu and plugins for CUDA 12 are packages of other names."""
    installed: dict[str, str] = {}

    def version_of(package: str) -> str:
        if package not in installed:
            raise PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(origin, "version", version_of)
    assert origin.compiler_of("cpu") is None
    with pytest.raises(ConfigError, match="none of libtpu, libtpu-nightly is installed"):
        origin.compiler_of("tpu")
    installed |= {"libtpu-nightly": "0.1.dev1", "jax-cuda12-pjrt": "0.10.2"}
    assert origin.compiler_of("tpu") == "libtpu-nightly 0.1.dev1"
    assert origin.compiler_of("gpu") == "jax-cuda12-pjrt 0.10.2"


def test_sources_are_programs_and_tuned_tiles(tmp_path: Path) -> None:
    tuned, code = tmp_path / "pallas" / "tuned" / "v6e.json", tmp_path / "models" / "layers.py"
    for path in (tuned, code):
        path.parent.mkdir(parents=True)
        path.write_text("1")
    digests = {origin.code_digest(tmp_path)}
    for path in (tuned, code):
        path.write_text("2")
        digests.add(origin.code_digest(tmp_path))
    assert len(digests) == 3
    (tmp_path / "models" / "layers.cpython-311.pyc").write_text("1")
    assert origin.code_digest(tmp_path) in digests


def test_processors_are_compiled_for_where_there_is_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = jax.devices

    def devices(platform: str | None = None) -> list[jax.Device]:
        assert platform == "cpu", "whoever does not ask for processors gets the GPU"
        return real("cpu")

    def compiled(*args: object, **kwargs: object) -> dict[Key, Any]:
        return {}

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr("jaxserve.launch.compile.compile_programs", compiled)
    compile_bundle(str(MODEL), "cpu", tmp_path / "out", settings=SHAPES)
    assert open_bundle(tmp_path / "out").origin.device_kind == "cpu"

    def left_out(platform: str | None = None) -> list[jax.Device]:
        raise RuntimeError(f"Unknown backend {platform}")

    monkeypatch.setattr(jax, "devices", left_out)
    with pytest.raises(ConfigError, match=r"may not use the processors here .* unset JAX_PLATFORMS"):
        compile_bundle(str(MODEL), "cpu", tmp_path / "another", settings=SHAPES)


def test_another_model_or_device_is_refused_before_shapes_are_made_for_it(folder: Path) -> None:
    bundle, mesh = open_bundle(folder), make_mesh()
    bundle.require(spec_of(str(MODEL)), mesh)
    with pytest.raises(ConfigError, match="was compiled for another model"):
        bundle.require(spec_of("qwen3-0.6b"), mesh)
    elsewhere = replace(bundle, origin=replace(bundle.origin, device_kind="TPU v6 lite"))
    with pytest.raises(ConfigError, match="device_kind TPU v6 lite"):
        elsewhere.require(spec_of(str(MODEL)), mesh)


def test_a_bundle_that_lacks_a_program_is_refused(folder: Path) -> None:
    bundle = open_bundle(folder)
    *others, last = bundle.entries
    with pytest.raises(ConfigError, match=f"lacks programs: {last.name} {last.bucket}"):
        load_here(replace(bundle, entries=tuple(others)))


@pytest.mark.parametrize(
    "change",
    [
        {"settings": {"colour": "red"}},
        {"settings": {"page_size": "many"}},
        {"settings": ["page_size"]},
        {"entries": [{"name": "head", "bucket": 1, "file": "../head-1.bin", "num_bytes": 1, "sha256": ""}]},
        {"entries": [{"name": "head"}]},
        {"origin": None},
    ],
)
def test_a_manifest_that_says_nonsense(folder: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
    with pytest.raises(ConfigError, match=r"manifest.json is damaged \("):
        open_bundle(tmp_path)


@pytest.mark.parametrize("depth", [100, 500, 100_000])
def test_a_manifest_in_itself_many_times(folder: Path, tmp_path: Path, depth: int) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    text = json.dumps({**manifest, "topology": "HERE"})
    (tmp_path / MANIFEST).write_text(text.replace('"HERE"', "[" * depth + "]" * depth))
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged \((ValueError: it is nested|Recursion)"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("change", [{"num_bytes": "1"}, {"num_bytes": -1}, {"sha256": None}])
def test_entries_of_odd_types(folder: Path, tmp_path: Path, change: dict[str, object]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["entries"][0].update(change)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"the size or the checksum of .* is none"):
        open_bundle(tmp_path)


@pytest.mark.parametrize("name", [MANIFEST, "manifest.sig", "executable", "key"])
def test_what_is_no_file_hangs_nobody(folder: Path, tmp_path: Path, name: str) -> None:
    changed = copy(folder, tmp_path / "changed")
    (tmp_path / "key").write_text("key")
    entry = open_bundle(folder).entries[0]
    path = {"key": tmp_path / "key", "executable": changed / entry.file}.get(name, changed / name)
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="it is not a regular file"):
        open_bundle(changed, read_key(tmp_path / "key") if name in ("key", "manifest.sig") else None)._checked(entry)


def test_bundles_of_before_are_refused(folder: Path, tmp_path: Path) -> None:
    """Executables of format 2 may lack their code, and nobody sees it before they run."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["origin"]["format"] = 2
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match=r"is a bundle of format 2, not \d+\. Compile it anew"):
        open_bundle(tmp_path)


def test_a_key_without_a_bundle_is_refused(folder: Path) -> None:
    config = load({"model": str(MODEL), "bundle_key": str(folder.parent / "key")}, environ={})
    source = resolve_source(str(MODEL), cache_dir=folder)
    spec = load_spec(source)
    model = Model(source=source, spec=spec, tokenizer=byte_tokenizer(spec), chat_template=None, name="tiny")
    with pytest.raises(ConfigError, match="--bundle-key checks the bundle that --bundle names"):
        build_engine(config, model)


def test_what_jax_adds_to_the_flags_where_there_is_a_tpu_does_not_count() -> None:
    set_by_jax = {"LIBTPU_INIT_ARGS": " --xla_tpu_use_enhanced_launch_barrier=true --xla_tpu_real=1"}
    assert compiler_flags(set_by_jax) == ("--xla_tpu_real=1",)


def test_the_last_value_of_a_switch_counts() -> None:
    def flags(text: str) -> tuple[str, ...]:
        return compiler_flags({"XLA_FLAGS": text})

    assert flags("--x=true --y=1 --x=false") == flags("--x=false\t--y=2 \n--y=1") == ("--x=false", "--y=1")
    assert flags("--x=false --x=true") == ("--x=true",)
    assert flags("--x=false --x") == ("--x",)
    assert flags('--a="b c" --d="e c"') == ('--a="b c"', '--d="e c"')


def test_values_that_xla_gathers_are_all_kept() -> None:
    """--xla_disable_hlo_passes=a --xla_disable_hlo_passes=b disables both."""
    assert compiler_flags({"XLA_FLAGS": "--x=a --w=1 --x=b"}) == ("--w=1", "--x=a --x=b")


def test_each_compiler_has_its_own_flags() -> None:
    first = {"XLA_FLAGS": "--x=1", "LIBTPU_INIT_ARGS": "--x=2"}
    assert compiler_flags(first) == ("--x=1", "--x=2")
    assert compiler_flags({"XLA_FLAGS": "--x=2", "LIBTPU_INIT_ARGS": "--x=1"}) == ("--x=2", "--x=1")


def test_a_file_of_flags_is_its_content(tmp_path: Path) -> None:
    file = tmp_path / "flags"
    for content in ("--x=1\n--y=2\n", "--x=1\n--y=3\n"):
        file.write_text(content)
        assert compiler_flags({"XLA_FLAGS": str(file)}) == tuple(content.split())
    assert compiler_flags({"XLA_FLAGS": "\n --x=1"}) == ("--x=1",)
    with pytest.raises(ConfigError, match=r"Cannot read .*missing, the file of flags that XLA_FLAGS names: No such"):
        compiler_flags({"XLA_FLAGS": str(tmp_path / "missing")})


def test_a_lesser_processor_is_refused(folder: Path) -> None:
    bundle = open_bundle(folder)
    with pytest.raises(ConfigError, match="a processor with amx_of_the_future"):
        load_here(replace(bundle, cpu_features=(*bundle.cpu_features, "amx_of_the_future")))


def test_damage_is_found_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    damaged = copy(folder, tmp_path / "damaged")
    bundle = open_bundle(damaged)
    path = damaged / bundle.entries[-1].file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged: its checksum.* Compile it anew"):
        load_here(bundle)
    path.unlink()
    with pytest.raises(ConfigError, match="Cannot read"):
        load_here(bundle)
    (damaged / MANIFEST).write_text("{}")
    with pytest.raises(ConfigError, match=r"manifest.json is damaged"):
        open_bundle(damaged)
    with pytest.raises(ConfigError, match="has no bundle"):
        open_bundle(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"words", "UnpicklingError: "),
        (pickle.dumps((b"", None)), "ValueError: not enough values to unpack"),
        (pickle.dumps((b"", None, None)), "EOFError"),
        (pickle.dumps((pickle.dumps("no executable"), None, None)), r"\w+Error: "),
    ],
    ids=["no pickle", "another tuple", "nothing in it", "something else in it"],
)
def test_a_file_that_is_whole_and_no_executable(folder: Path, tmp_path: Path, content: bytes, reason: str) -> None:
    spoilt = copy(folder, tmp_path / "spoilt")
    bundle = open_bundle(spoilt)
    *others, last = bundle.entries
    (spoilt / last.file).write_bytes(content)
    entries = (*others, replace(last, sha256=hashlib.sha256(content).hexdigest()))
    with pytest.raises(ConfigError, match=rf"Cannot load \S*{last.file} \({reason}.* Compile it anew with"):
        load_here(replace(bundle, entries=entries))


@pytest.mark.parametrize("change", ["swapped files", "a setting that shapes nothing", "a setting too few"])
def test_manifests_that_no_compilation_wrote(folder: Path, tmp_path: Path, change: str) -> None:
    changed = copy(folder, tmp_path / "changed")
    manifest = json.loads((changed / MANIFEST).read_text())
    match change:
        case "swapped files":
            first, second, *_ = manifest["entries"]
            for name in ("file", "sha256"):
                first[name], second[name] = second[name], first[name]
        case "a setting that shapes nothing":
            manifest["settings"]["host"] = "0.0.0.0"
        case _:
            del manifest["settings"]["num_pages"]
    (changed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(
        ConfigError,
        match=r"manifest.json is damaged \(ValueError: (wrong settings: (host|num_pages)|.*bin is not where)",
    ):
        open_bundle(changed)


def test_a_bundle_has_a_folder_of_its_own(folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    for place in (link, Path(), tmp_path / "gone" / ".."):
        with pytest.raises(ConfigError, match="must name the bundle's own folder"):
            require_place(place)
    require_place(tmp_path / "new")


def test_files_are_checked_before_weights_are_loaded(folder: Path, tmp_path: Path) -> None:
    damaged = copy(folder, tmp_path / "damaged")
    bundle = open_bundle(damaged)
    spec, mesh = spec_of(str(MODEL)), make_mesh()
    bundle.require(spec, mesh)
    (damaged / bundle.entries[-1].file).unlink()
    with pytest.raises(ConfigError, match=r"Cannot read .* Compile it anew"):
        bundle.require(spec, mesh)


def test_signatures(folder: Path, tmp_path: Path) -> None:
    assert open_bundle(folder, b"a secret").origin == open_bundle(folder).origin
    with pytest.raises(ConfigError, match="not signed with the key"):
        open_bundle(folder, b"another")
    changed = copy(folder, tmp_path / "changed")
    manifest = json.loads((changed / MANIFEST).read_text())
    manifest["entries"][0]["sha256"] = "0" * 64
    (changed / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="not signed with the key"):
        open_bundle(changed, b"a secret")
    (changed / "manifest.sig").unlink()
    with pytest.raises(ConfigError, match="has no signature"):
        open_bundle(changed, b"a secret")
    (changed / "manifest.sig").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not signed with the key"):
        open_bundle(changed, b"a secret")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="is empty"):
        read_key(tmp_path / "empty")


def test_a_signature_that_nobody_checks_is_worth_a_warning(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_bundle(folder, b"a secret")
    unsigned = copy(folder, tmp_path / "unsigned")
    (unsigned / "manifest.sig").unlink()
    open_bundle(unsigned)
    assert caplog.messages == []
    open_bundle(folder)
    assert caplog.messages == [f"{folder} is signed, but no bundle key is given: its signature is not checked"]


def test_a_bundle_replaces_a_bundle_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    made_for: Origin = open_bundle(folder).origin
    out = copy(folder, tmp_path / "out")
    write_bundle(out, {}, topology="cpu", origin=made_for, settings={})
    assert [path.name for path in out.iterdir()] == [MANIFEST]
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="is no bundle; choose another"):
        write_bundle(precious, {}, topology="cpu", origin=made_for, settings={})
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_place_that_is_taken_is_refused_before_compiling(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words")
    with pytest.raises(ConfigError, match="is there already"):
        compile_bundle(str(MODEL), "cpu", tmp_path / "file", settings=SHAPES)


def test_a_place_that_cannot_be_written_to_is_refused_before_compiling(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("words")
    with pytest.raises(ConfigError, match=r"Cannot write a bundle to .*: (File exists|Not a directory)"):
        compile_bundle(str(MODEL), "cpu", tmp_path / "file" / "out", settings=SHAPES)


def test_a_model_is_itself_in_every_form() -> None:
    """A GGUF file keeps 1e-5 as float32; anything else that differs is another model."""
    spec = spec_of("smollm2-135m")
    assert spec_digest(replace(spec, norm_eps=9.999999747378752e-06)) == spec_digest(spec)
    assert spec_digest(replace(spec, norm_eps=1e-6)) != spec_digest(spec)
    assert spec_digest(replace(spec, eos_token_ids=(0, 2, 4), bos_token_id=None)) == spec_digest(spec)
    assert spec_digest(replace(spec, rope=replace(spec.rope, theta=10001.0))) != spec_digest(spec)
    yarn = YarnRopeScaling(
        factor=4.0, original_max_len=64, beta_fast=32.0, beta_slow=1.0, truncate=True, attention_factor=1.0
    )
    scalings = [
        *(yarn, replace(yarn, truncate=False), replace(yarn, attention_factor=1.1)),
        *(DynamicRopeScaling(factor=factor, original_max_len=64) for factor in (2.0, 4.0)),
        LinearRopeScaling(factor=4.0),
    ]
    digests = {spec_digest(replace(spec, rope=replace(spec.rope, scaling=each))) for each in scalings}
    assert len(digests | {spec_digest(spec)}) == len(scalings) + 1


def test_flags_of_serve() -> None:
    config = load({"bundle": "made", "bundle_key": "key"}, environ={})
    assert (config.bundle, config.bundle_key) == (Path("made"), Path("key"))
