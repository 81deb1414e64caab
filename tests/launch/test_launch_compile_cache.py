"""A bundle is the same whether or not JAX keeps executables on disk: none that was read from there gets into one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from jaxserve.checkpoint.sources import spec_of
from jaxserve.core.config import ServeConfig
from jaxserve.engine.compile import compile_holders, enable_persistent_cache
from jaxserve.launch.build import plan_replica
from jaxserve.launch.bundle import open_bundle
from jaxserve.launch.compile import compile_bundle
from jaxserve.sharding.mesh import make_mesh

MODEL = str(Path(__file__).parents[1] / "goldens" / "tiny" / "llama")
SHAPES = {"max_num_seqs": "1", "max_num_batched_tokens": "1", "num_pages": "2", "max_model_len": "16"}
SWITCH = "jax_enable_compilation_cache"
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Where JAX keeps executables for the time of a test."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    enable_persistent_cache(tmp_path / "cache")
    reset_cache()
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.fixture
def restored() -> Iterator[None]:
    """JAX's settings of the cache as they were, after a test."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    reset_cache()


@pytest.mark.usefixtures("restored")
def test_a_cache_that_cannot_be_made_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    before = jax.config.values["jax_compilation_cache_dir"]
    enable_persistent_cache(tmp_path / "file" / "programs")
    assert jax.config.values["jax_compilation_cache_dir"] == before
    assert "compiled programs are not kept" in caplog.text
    assert "Not a directory" in caplog.text


@pytest.mark.usefixtures("restored")
def test_a_cache_that_cannot_be_written_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("jaxserve.engine.compile.tempfile.TemporaryFile", refuse)
    enable_persistent_cache(tmp_path)
    reset_cache()
    assert "Permission denied" in caplog.text
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path)
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7)).block_until_ready()
    assert kept(tmp_path) == 0, "nothing is tried to be written"


def kept(cache: Path) -> int:
    """Executables in the cache."""
    return len(list(cache.glob("*-cache")))


def test_what_jax_keeps_on_disk_is_compiled_nevertheless(cache: Path, tmp_path: Path) -> None:
    settings = {name: int(text) for name, text in SHAPES.items()}
    replica, _ = plan_replica(ServeConfig(model=MODEL, **settings), spec_of(MODEL), make_mesh())
    compile_holders(replica)
    assert kept(cache) > 0, "there is something to be read"

    compile_bundle(MODEL, "cpu", tmp_path / "out", settings=SHAPES)

    bundle = open_bundle(tmp_path / "out")
    config = bundle.adopt(ServeConfig(model=MODEL))
    executables = bundle.load(replica, config)
    assert len(executables) == len(bundle.entries)
    for path, struct in replica.loaded_otherwise().items():
        loaded = jax.device_put(jnp.ones(struct.shape, struct.dtype), struct.sharding)
        assert jax.tree.leaves(replica.hold(path, loaded, executables)), "one without code cannot be run"


@pytest.mark.parametrize("fails", [False, True])
def test_the_cache_is_used_again_afterwards(
    cache: Path, tmp_path: Path, fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def compiled(*args: object, **kwargs: object) -> dict[object, object]:
        jax.jit(lambda x: x * 3 + 1).lower(jnp.ones(3)).compile()
        seen.append((jax.config.values[SWITCH], kept(cache)))
        if fails:
            raise ValueError("out of memory")
        return {}

    monkeypatch.setattr("jaxserve.launch.compile.compile_programs", compiled)
    if fails:
        with pytest.raises(ValueError, match="out of memory"):
            compile_bundle(MODEL, "cpu", tmp_path / "out", settings=SHAPES)
    else:
        compile_bundle(MODEL, "cpu", tmp_path / "out", settings=SHAPES)
        assert not any(SWITCH in each for each in open_bundle(tmp_path / "out").origin.jax_settings)
    assert seen == [(False, 0)]
    assert jax.config.values[SWITCH] is True
    jax.jit(lambda x: x * 5 + 1).lower(jnp.ones(3)).compile()
    assert kept(cache) > 0
