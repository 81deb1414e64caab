"""What is refused before anything is compiled or loaded."""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh

from jaxserve.checkpoint.checksums import Check
from jaxserve.checkpoint.loader import Hold
from jaxserve.checkpoint.presets import default_presets_dir, read_preset
from jaxserve.checkpoint.sources import CheckpointSource, SourceKind, spec_of
from jaxserve.cli import main
from jaxserve.core.config import ServeConfig
from jaxserve.core.errors import CheckpointError, ConfigError
from jaxserve.engine.compile import Executables
from jaxserve.engine.programs import Program, Replica, programs
from jaxserve.launch.aot import config_for
from jaxserve.launch.build import build_engine, find_model, plan_replica, require_attention
from jaxserve.launch.estimate import Workload
from jaxserve.launch.fit import fit
from jaxserve.launch.loading import load_and_compile
from jaxserve.models.params import Held, ParamInfo
from jaxserve.models.spec import DynamicRopeScaling, ModelSpec
from jaxserve.sharding.mesh import make_mesh
from jaxserve.sharding.topology import parse_topology

GOLDENS = Path(__file__).parents[1] / "goldens" / "tiny"
TEXT_DATA = Path(__file__).parents[1] / "text" / "data"
MODEL = "random:smollm2-135m"
SPEC = spec_of(MODEL)
MOST_PAGES = (2**31 - 1) // SPEC.num_layers


@pytest.mark.parametrize(
    ("attention", "platform", "instead"),
    [
        ("gpu", "tpu", "tpu, xla, reference"),
        ("tpu", "gpu", "gpu, xla, reference"),
        ("gpu", "cpu", "xla, reference, tpu"),
    ],
)
def test_attention_that_a_platform_cannot_run(attention: str, platform: str, instead: str) -> None:
    message = f"--attention {attention} does not run on a {platform.upper()}; use {instead}, or leave"
    with pytest.raises(ConfigError, match=message):
        require_attention(ServeConfig(attention=attention), platform)


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("attention", [None, "xla", "reference", "the platform's"])
def test_attention_that_it_can(attention: str | None, platform: str) -> None:
    chosen = {"cpu": "tpu"}.get(platform, platform) if attention == "the platform's" else attention
    require_attention(ServeConfig(attention=chosen), platform)


def test_replicas_and_slices_are_asked() -> None:
    """Serve, compile and bench plan a replica; plan and aot also learn it before they start a process."""
    with pytest.raises(ConfigError, match="--attention gpu does not run on a CPU"):
        plan_replica(ServeConfig(model=MODEL, attention="gpu"), SPEC, make_mesh())
    with pytest.raises(ConfigError, match="--attention gpu does not run on a TPU"):
        config_for(MODEL, {"attention": "gpu"}, parse_topology("v6e:1x1"))


def test_interpreted_kernels_are_not_compiled_into_a_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", MODEL, "--attention", "tpu", "--out", str(tmp_path / "made")]) == 2
    assert capsys.readouterr().err.startswith("jaxserve: --attention tpu is interpreted on CPUs")
    assert list(tmp_path.iterdir()) == []


def test_pages_of_all_layers_have_a_number() -> None:
    config = ServeConfig(model=MODEL, num_pages=MOST_PAGES)
    replica, _ = plan_replica(config, SPEC, make_mesh())
    assert replica.layout.num_pages == MOST_PAGES
    with pytest.raises(ConfigError, match=f"={MOST_PAGES + 1} is too many: 30 layers have room for {MOST_PAGES}"):
        plan_replica(replace(config, num_pages=MOST_PAGES + 1), SPEC, make_mesh())


def test_lengths_that_change_positions_are_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    """The default is the length at which all positions are as trained."""
    rope = replace(SPEC.rope, scaling=DynamicRopeScaling(factor=4.0, original_max_len=2048))
    spec = replace(SPEC, max_position=8192, rope=rope)
    with caplog.at_level(logging.WARNING):
        assert plan_replica(ServeConfig(model=MODEL), spec, make_mesh())[1].max_model_len == 2048
        assert not caplog.records
        longer = ServeConfig(model=MODEL, max_model_len=8192)
        assert plan_replica(longer, spec, make_mesh())[1].max_model_len == 8192
    assert "max_model_len=8192 is beyond the 2048 tokens" in caplog.text
    with pytest.raises(ConfigError, match="max_model_len=8193 is beyond the model's 8192 positions"):
        plan_replica(replace(longer, max_model_len=8193), spec, make_mesh())


def test_keys_are_passed_over_wherever_a_model_is_read(tmp_path: Path) -> None:
    shutil.copytree(TEXT_DATA / "llama3_folder", tmp_path, dirs_exist_ok=True)
    preset = read_preset("smollm2-135m", default_presets_dir())
    assert preset is not None
    (tmp_path / "config.json").write_text(json.dumps({**preset.config, "novelty": 3}))
    config = ServeConfig(model=str(tmp_path))
    passing = replace(config, ignore_config_keys=("novelty",))
    with pytest.raises(CheckpointError, match=r"unknown key novelty = 3\. .* --ignore-config-keys novelty$"):
        find_model(config)
    assert find_model(passing).spec == SPEC
    workload = Workload(input_len=16, output_len=16, concurrency=1)
    with pytest.raises(CheckpointError, match="--ignore-config-keys novelty"):
        fit(str(tmp_path), workload, settings={})
    assert fit(str(tmp_path), workload, settings={"ignore_config_keys": "novelty"})


def test_more_ends_of_sequence_than_the_sampler_holds() -> None:
    with pytest.raises(CheckpointError, match="has 65 end-of-sequence tokens; at most 64"):
        plan_replica(ServeConfig(model=MODEL), replace(SPEC, eos_token_ids=tuple(range(65))), make_mesh())


def test_a_load_that_fails_ends_the_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    started = threading.Event()

    def fail(*args: object, **kwargs: object) -> Mapping[str, Held]:
        assert started.wait(60)
        raise CheckpointError("the weights are lost")

    def compile_slowly(program: Program, mesh: Mesh | None) -> None:
        compiled.append(program.key)
        started.set()
        time.sleep(0.05)

    monkeypatch.setattr("jaxserve.launch.loading.load_params", fail)
    monkeypatch.setattr("jaxserve.engine.compile._compile", compile_slowly)
    config = ServeConfig(model=MODEL, max_model_len=64, num_pages=8, compilation_cache=False)
    model = find_model(config)
    with pytest.raises(CheckpointError, match="the weights are lost"):
        build_engine(config, model)
    assert 0 < len(compiled) < len(programs(plan_replica(config, model.spec, make_mesh())[0])) - 2


def test_a_model_of_ones_own_needs_no_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("jaxserve.launch.build.cache_dir", lambda: None)
    config = ServeConfig(model=MODEL, max_model_len=64, num_pages=8)
    monkeypatch.setattr("jaxserve.launch.build.load_and_compile", lambda *_: (_ for _ in ()).throw(ConfigError("far")))
    with pytest.raises(ConfigError, match="far"):
        build_engine(config, find_model(config))
    assert "compiled programs are not kept, for there is no home directory" in caplog.text


def test_verify_model_hashes_what_was_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def resolve(model: str, *, check: Check, **_: object) -> CheckpointSource:
        asked.append(check)
        raise CheckpointError("far enough")

    monkeypatch.setattr("jaxserve.launch.build.resolve_source", resolve)
    for verify in (False, True):
        with pytest.raises(CheckpointError, match="far enough"):
            find_model(ServeConfig(model="smollm2-135m", verify_model=verify))
    assert asked == [Check.SIZES, Check.HASHES]


def test_the_engine_stops_where_the_tokenizer_says(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The config names one end, the tokenizer another: those of chats are often in tokenizer_config.json only."""
    folder = copytree(TEXT_DATA / "llama3_folder", tmp_path / "model")
    config = {**json.loads((GOLDENS / "llama" / "config.json").read_text()), "vocab_size": 2000, "eos_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    model = find_model(ServeConfig(model=str(folder)))
    assert model.spec.eos_token_ids == (0, 2)
    assert set(model.tokenizer.eos_token_ids) == {0, 2}
    assert "the tokenizer has ids up to" not in caplog.text
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 2}))
    assert find_model(ServeConfig(model=str(folder))).spec.eos_token_ids == (0,), "the model cannot produce 2"
    assert "the tokenizer has ids up to 1102, the model only up to 1" in caplog.text


def test_a_load_that_waits_for_a_program_ends_when_compiling_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(replica: Replica) -> Executables:
        raise ConfigError("the compiler is lost")

    monkeypatch.setattr("jaxserve.launch.loading.compile_holders", fail)
    config = ServeConfig(model=MODEL, max_model_len=64, num_pages=8, compilation_cache=False)
    model = find_model(config)
    assert plan_replica(config, model.spec, make_mesh())[0].holders(), "nothing would wait"
    with pytest.raises(ConfigError, match="the compiler is lost"):
        build_engine(config, model)


def test_a_compilation_that_fails_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even once the first parameters are held."""
    held = []
    failed = threading.Event()

    def load(
        source: CheckpointSource, spec: ModelSpec, abstract: Mapping[str, ParamInfo], *, hold: Hold, **_: object
    ) -> Mapping[str, Held]:
        for path, info in abstract.items():
            held.append(path)
            hold(path, jnp.zeros(info.shape, info.dtype))
            assert failed.wait(60)
        raise AssertionError("nobody ended it")

    def fail(*_: object, **__: object) -> Executables:
        while not held:
            time.sleep(0.01)
        threading.Timer(0.2, failed.set).start()
        raise ConfigError("the compiler is lost")

    monkeypatch.setattr("jaxserve.launch.loading.load_params", load)
    monkeypatch.setattr("jaxserve.launch.loading.compile_programs", fail)
    config = ServeConfig(model=MODEL, max_model_len=64, num_pages=8, compilation_cache=False)
    with pytest.raises(ConfigError, match="the compiler is lost"):
        build_engine(config, find_model(config))
    assert len(held) == 2, "the second one was refused"


def test_a_compiler_that_bears_one_program_at_a_time_gets_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are made by programs, which another thread would compile."""
    threads = set()

    def loaded(*_: object, hold: Hold, **__: object) -> Mapping[str, Held]:
        threads.add(threading.current_thread().name)
        return {}

    monkeypatch.setattr("jaxserve.launch.loading.load_params", loaded)
    monkeypatch.setattr("jaxserve.launch.loading.compile_programs", lambda *_, **__: {})
    replica, config = plan_replica(ServeConfig(model=MODEL), SPEC, make_mesh())[0], ServeConfig(model=MODEL)
    source = CheckpointSource(kind=SourceKind.RANDOM, path=Path("random"), name="random")
    load_and_compile(source, SPEC, replica, config, None, None)
    assert threads == {"load_0"}
    monkeypatch.setattr("jaxserve.launch.loading.compiles_at_once", lambda kind: 1)
    load_and_compile(source, SPEC, replica, config, None, None)
    assert threads == {"load_0", "MainThread"}


def test_attention_that_was_asked_for_and_cannot() -> None:
    config = ServeConfig(
        model=MODEL, attention="tpu", kv_cache_dtype="float16", max_model_len=64, num_pages=8, compilation_cache=False
    )
    with pytest.raises(ConfigError, match="--attention tpu cannot serve this: TPUs have no arithmetic for float16"):
        build_engine(config, find_model(config))


def test_a_pool_for_which_there_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(*_: object) -> None:
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 18 bytes.\nMore of it.")

    monkeypatch.setattr("jaxserve.launch.build.load_and_compile", lambda *_: ({}, {}))
    monkeypatch.setattr("jaxserve.launch.build.DeviceRunner", lacking)
    config = ServeConfig(model=MODEL, max_model_len=64, num_pages=4096, compilation_cache=False)
    with pytest.raises(
        ConfigError, match=r"no room for 1\.4 GiB of KV cache .*allocating 18 bytes\.\); lower num_pages="
    ):
        build_engine(config, find_model(config))
