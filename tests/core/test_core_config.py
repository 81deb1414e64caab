"""Where settings come from, which goes first, what is refused, and what "auto" becomes."""

from __future__ import annotations

import argparse
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from jaxserve.core.config import MeshShape, ServeConfig, add_arguments, load
from jaxserve.core.environment import cache_dir, cluster_environment, service_links, warn_of_service_links
from jaxserve.core.errors import ConfigError
from jaxserve.core.resolution import Facts, resolve

MIB = 1 << 20
CPU = Facts(
    platform="cpu",
    max_position=8192,
    default_max_len=8192,
    checkpoint_dtype="bfloat16",
    device_memory_bytes=None,
    weight_bytes=540 * MIB,
    kv_bytes_per_token=46080,
)
TPU = replace(CPU, platform="tpu", device_memory_bytes=16 << 30, weight_bytes=8 << 30, kv_bytes_per_token=131072)


def yaml(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text)
    return path


class TestLoad:
    def test_nothing_given_is_the_defaults(self) -> None:
        assert load({}, environ={}) == ServeConfig()

    def test_flags_go_before_environment_before_file_before_defaults(self, tmp_path: Path) -> None:
        file = yaml(tmp_path, "port: 1\nhost: file\nmax_num_seqs: 3\n")
        environ = {"JAXSERVE_PORT": "2", "JAXSERVE_HOST": "environment"}
        config = load({"port": "4", "host": None}, file=file, environ=environ)
        assert (config.port, config.host, config.max_num_seqs, config.seed) == (4, "environment", 3, 0)

    def test_every_setting_has_a_flag_a_key_and_a_variable(self, tmp_path: Path) -> None:
        samples: dict[str, tuple[str, Any]] = {
            "model": ("m", "m"),
            "role": ("both", "both"),
            "host": ("h", "h"),
            "port": ("1", 1),
            "mesh": ("tensor=2", MeshShape(tensor=2)),
            "dtype": ("bfloat16", "bfloat16"),
            "quantization": ("int8", "int8"),
            "kv_cache_dtype": ("float16", "float16"),
            "attention": ("xla", "xla"),
            "enable_prefix_caching": ("false", False),
            "memory_fraction": ("0.5", 0.5),
            "generation_config": ("none", "none"),
            "served_model_name": ("a,b", ("a", "b")),
            "ignore_config_keys": ("a,rope_scaling.b", ("a", "rope_scaling.b")),
            "api_key": ("a,b", ("a", "b")),
            "trusted_proxies": ("10.0.0.0/8,::1", ("10.0.0.0/8", "::1")),
            "min_priority": ("-7", -7),
            "share_prefix_cache": ("true", True),
            "api_key_file": ("/keys", Path("/keys")),
            "tls_cert": ("/cert.pem", Path("/cert.pem")),
            "tls_key": ("/key.pem", Path("/key.pem")),
            "allowed_hosts": ("a.example,10.0.0.0/8", ("a.example", "10.0.0.0/8")),
            "allowed_origins": ("https://a.example", ("https://a.example",)),
            "drain_deadline_s": ("1.5", 1.5),
            "cache_dir": ("/x", Path("/x")),
            "bundle": ("/b", Path("/b")),
            "bundle_key": ("/k", Path("/k")),
            "verify_model": ("true", True),
            "compilation_cache": ("false", False),
            "offline": ("true", True),
            "log_level": ("debug", "debug"),
            "log_format": ("json", "json"),
            "otlp_endpoint": ("http://c:4317", "http://c:4317"),
            "chat_template": ("t.jinja", Path("t.jinja")),
        }
        parser = argparse.ArgumentParser()
        add_arguments(parser)
        for setting in fields(ServeConfig):
            text, value = samples.get(setting.name, ("7", 7))
            expected = replace(ServeConfig(), **{setting.name: value})
            assert load({}, environ={f"JAXSERVE_{setting.name.upper()}": text}) == expected
            assert load({}, file=yaml(tmp_path, f"{setting.name}: {text}\n"), environ={}) == expected
            if setting.name != "model":
                flag = setting.name.replace("_", "-")
                switch = f"--{flag}" if value is True else f"--no-{flag}"
                given = [switch] if isinstance(value, bool) else [f"--{flag}", text]
                assert load(vars(parser.parse_args(given)), environ={}) == expected

    def test_yaml_values_may_be_yaml(self, tmp_path: Path) -> None:
        text = "mesh: {tensor: 4, data: 1}\napi_key: [a, b]\nquantization: null\nenable_prefix_caching: no\n"
        config = load({}, file=yaml(tmp_path, text), environ={})
        assert config.mesh == MeshShape(tensor=4)
        assert (config.api_key, config.quantization, config.enable_prefix_caching) == (("a", "b"), None, False)

    def test_auto_can_be_said(self) -> None:
        assert load({"dtype": "auto", "quantization": "none"}, environ={}) == ServeConfig()

    @pytest.mark.parametrize(
        ("variable", "text", "wanted"),
        [
            ("PORT", "abc", r"a whole number in \[0, 65535\]"),
            ("PORT", "70000", r"a whole number in \[0, 65535\]"),
            ("MAX_NUM_SEQS", "", r"a whole number in \[1, 4096\]"),
            ("SEED", "1.5", "a whole number of at least 0"),
            ("MEMORY_FRACTION", "most", r"a number in \[0.01, 1\]"),
            ("LOG_LEVEL", "loud", "one of debug, info, warning, error"),
            ("OFFLINE", "perhaps", "true or false"),
        ],
    )
    def test_an_error_names_the_variable_and_what_it_must_be(self, variable: str, text: str, wanted: str) -> None:
        with pytest.raises(ConfigError, match=f"JAXSERVE_{variable}: '{text}' is not {wanted}"):
            load({}, environ={f"JAXSERVE_{variable}": text})

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("role", "both"),
            ("dtype", "auto, float32, bfloat16, float16"),
            ("kv_cache_dtype", "auto, float32, bfloat16, float16"),
            ("quantization", "none, int8"),
            ("attention", "auto, reference, xla, tpu, gpu"),
            ("log_level", "debug, info, warning, error"),
            ("log_format", "text, json"),
        ],
    )
    def test_help_lists_the_choices(self, name: str, words: str) -> None:
        parser = argparse.ArgumentParser(formatter_class=lambda prog: argparse.HelpFormatter(prog, width=1000))
        add_arguments(parser)
        _, _, about = parser.format_help().rpartition(f"--{name.replace('_', '-')} VALUE")
        assert f"; one of: {words} (default: " in about.partition("--")[0]
        for word in words.split(", "):
            load({name: word}, environ={})

    def test_one_error_lists_all_that_is_wrong(self, tmp_path: Path) -> None:
        file = yaml(tmp_path, "prot: 1\nport: many\n")
        environ = {"JAXSERVE_SEEED": "1", "JAXSERVE_DTYPE": "int3", "HOME": "/"}
        with pytest.raises(ConfigError) as caught:
            load({"max_num_seqs": "0"}, file=file, environ=environ)
        for part in ("prot in", "port in", "JAXSERVE_SEEED", "JAXSERVE_DTYPE", "'int3'", "--max-num-seqs"):
            assert part in caught.value.message

    @pytest.mark.parametrize(
        "flags",
        [
            {"port": "65536"},
            {"port": "-1"},
            {"port": "1.5"},
            {"mesh": "tensor=0"},
            {"mesh": "rows=2"},
            {"mesh": "tensor=2,tensor=2"},
            {"enable_prefix_caching": "maybe"},
            {"memory_fraction": "1.5"},
            {"memory_fraction": "nan"},
            {"drain_deadline_s": "-1"},
            {"role": "prefill"},
            {"trusted_proxies": "10.0.0.0/99"},
            {"min_priority": "1"},
            {"max_priority": "-1"},
            {"quantization": "int3"},
            {"log_level": "loud"},
        ],
    )
    def test_wrong_values(self, flags: dict[str, str]) -> None:
        [name] = flags
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}"):
            load(flags, environ={})

    @pytest.mark.parametrize("text", ["[1, 2]", "a: b: c", "just words"])
    def test_files_that_are_no_mapping(self, tmp_path: Path, text: str) -> None:
        with pytest.raises(ConfigError, match=r"serve\.yaml"):
            load({}, file=yaml(tmp_path, text), environ={})

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="Cannot read"):
            load({}, file=tmp_path / "none.yaml", environ={})

    def test_an_empty_file_says_nothing(self, tmp_path: Path) -> None:
        assert load({}, file=yaml(tmp_path, "# nothing yet\n"), environ={}) == ServeConfig()


def links(service: str, address: str = "10.96.0.7") -> dict[str, str]:
    """What Kubernetes puts into each pod of a namespace for one of its Services."""
    name = service.upper().replace("-", "_")
    host = f"[{address}]" if ":" in address else address
    return {
        f"{name}_SERVICE_HOST": address,
        f"{name}_SERVICE_PORT": "8000",
        f"{name}_SERVICE_PORT_HTTP_METRICS": "8000",
        f"{name}_PORT": f"tcp://{host}:8000",
        f"{name}_PORT_8000_TCP": f"tcp://{host}:8000",
        f"{name}_PORT_8000_TCP_PROTO": "tcp",
        f"{name}_PORT_8000_TCP_PORT": "8000",
        f"{name}_PORT_8000_TCP_ADDR": address,
        f"{name}_PORT_53_UDP": f"udp://{host}:53",
        f"{name}_PORT_53_UDP_PROTO": "udp",
    }


class TestServiceLinks:
    """A Service called `jaxserve`, or `jaxserve-` and anything, must not keep a pod from starting."""

    @pytest.mark.parametrize(
        "service", ["jaxserve", "jaxserve-grpc", "jaxserve-model-7b", "jaxserve-port", "jaxserve-seed"]
    )
    @pytest.mark.parametrize("address", ["10.96.0.7", "fd00:10:96::7"])
    def test_they_are_no_settings(self, service: str, address: str) -> None:
        environ = links(service, address)
        assert load({}, environ=environ) == ServeConfig()
        assert set(service_links(environ)) == set(environ)
        assert load({}, environ={**environ, "JAXSERVE_SEED": "3"}) == ServeConfig(seed=3)

    @pytest.mark.parametrize(
        ("variable", "value"),
        [
            ("JAXSERVE_PORT", "abc"),
            ("JAXSERVE_PORT", "tcp://"),
            ("JAXSERVE_PORT", "http://10.0.0.1:80"),
            ("JAXSERVE_FOO", "tcp://10.0.0.1:80"),
            ("JAXSERVE_SERVICE_HOST", "not-an-address"),
            ("JAXSERVE_GRPC_PORTS", "8000"),
            ("JAXSERVE_SERVICE_PORTS", "8000"),
            ("JAXSERVE_HOSTS", "10.0.0.1"),
        ],
    )
    def test_what_only_looks_alike_is_an_error(self, variable: str, value: str) -> None:
        assert service_links({variable: value}) == ()
        with pytest.raises(ConfigError, match=variable):
            load({}, environ={variable: value})

    def test_one_warning_names_them(self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
        warn_of_service_links()
        assert caplog.messages == []
        for variable, value in links("jaxserve").items():
            monkeypatch.setenv(variable, value)
        warn_of_service_links()
        [message] = caplog.messages
        assert all(variable in message for variable in links("jaxserve"))


class TestResolve:
    def test_cpu(self) -> None:
        resolved = resolve(ServeConfig(), CPU)
        assert (resolved.dtype, resolved.kv_cache_dtype, resolved.page_size) == ("bfloat16", "bfloat16", 16)
        assert resolved.num_pages * 16 * 46080 <= 512 * MIB
        assert resolved.num_pages * 16 <= 16384
        assert resolved.max_model_len == 8192
        assert resolved.seq_buckets[-1] == resolved.max_num_seqs == 64
        assert resolved.token_buckets[-1] == resolved.max_num_batched_tokens == 512

    def test_accelerator(self) -> None:
        resolved = resolve(ServeConfig(), TPU)
        assert (resolved.dtype, resolved.page_size, resolved.max_num_seqs) == ("bfloat16", 64, 256)
        used = resolved.num_pages * 64 * TPU.kv_bytes_per_token + TPU.weight_bytes
        assert 0.89 * (16 << 30) < used <= 0.9 * (16 << 30)

    @pytest.mark.parametrize(("platform", "dtype"), [("cpu", "bfloat16"), ("tpu", "bfloat16"), ("gpu", "float16")])
    def test_float16_checkpoints(self, platform: str, dtype: str) -> None:
        assert resolve(ServeConfig(), replace(TPU, platform=platform, checkpoint_dtype="float16")).dtype == dtype

    def test_what_is_said_is_kept(self) -> None:
        asked = ServeConfig(
            dtype="bfloat16",
            kv_cache_dtype="float16",
            page_size=8,
            num_pages=100,
            max_model_len=500,
            max_num_seqs=5,
            max_num_batched_tokens=100,
            long_prefill_token_threshold=33,
        )
        resolved = resolve(asked, CPU)
        assert (resolved.dtype, resolved.kv_cache_dtype) == ("bfloat16", "float16")
        assert (resolved.page_size, resolved.num_pages, resolved.max_model_len) == (8, 100, 500)
        assert (resolved.max_num_seqs, resolved.max_num_batched_tokens) == (5, 100)
        assert resolved.long_prefill_token_threshold == 33
        assert resolved.asked is asked

    @pytest.mark.parametrize("facts", [CPU, TPU])
    @pytest.mark.parametrize("asked", [ServeConfig(), ServeConfig(max_num_seqs=1), ServeConfig(max_num_seqs=7)])
    def test_buckets_ascend_and_end_at_the_limit(self, facts: Facts, asked: ServeConfig) -> None:
        resolved = resolve(asked, facts)
        for sizes, limit in (
            (resolved.seq_buckets, resolved.max_num_seqs),
            (resolved.token_buckets, resolved.max_num_batched_tokens),
        ):
            assert list(sizes) == sorted(set(sizes))
            assert sizes[-1] == limit

    def test_a_small_pool_bounds_the_context(self) -> None:
        assert resolve(ServeConfig(num_pages=10, page_size=16), CPU).max_model_len == 160

    @pytest.mark.parametrize(
        ("asked", "param"),
        [
            (ServeConfig(max_num_seqs=8, max_num_batched_tokens=7), "max_num_batched_tokens"),
            (ServeConfig(max_model_len=8193), "max_model_len"),
            (ServeConfig(max_model_len=161, num_pages=10, page_size=16), "max_model_len"),
        ],
    )
    def test_contradictions(self, asked: ServeConfig, param: str) -> None:
        with pytest.raises(ConfigError) as caught:
            resolve(asked, CPU)
        assert caught.value.param == param

    def test_weights_that_leave_no_room(self) -> None:
        with pytest.raises(ConfigError, match="no room"):
            resolve(ServeConfig(), replace(TPU, weight_bytes=16 << 30))

    def test_accelerators_have_few_shapes_and_large_pages(self) -> None:
        """Padding up to 256 rows is free there; kernels read a page table's rows as they need them."""
        resolved = resolve(ServeConfig(), TPU)
        assert resolved.seq_buckets == (64, 256)
        assert resolved.token_buckets == (16, 64, 256, 512, 1024)
        few = resolve(ServeConfig(max_num_seqs=8), TPU)
        assert few.seq_buckets == (8,)
        assert few.token_buckets == (8, 256, 512, 1024)
        assert (resolved.dtype, resolved.page_size) == ("bfloat16", 64)
        far = replace(TPU, max_position=40960, default_max_len=40960, weight_bytes=1 << 30, kv_bytes_per_token=16384)
        assert [resolve(ServeConfig(max_num_seqs=n), far).page_size for n in (128, 512)] == [64, 64]
        assert resolve(ServeConfig(), replace(far, platform="gpu")).page_size == 64
        assert resolve(ServeConfig(page_size=16), far).page_size == 16

    def test_a_pool_that_a_device_cannot_hold(self) -> None:
        """8 of 16 GiB are left; a page of 64 tokens takes 8 MiB."""
        assert resolve(ServeConfig(num_pages=1024, max_model_len=64), TPU).num_pages == 1024
        with pytest.raises(ConfigError, match=r"room for 1024 pages of 64 tokens .* not for num_pages=1025"):
            resolve(ServeConfig(num_pages=1025), TPU)

    def test_a_share_of_nobody_s_memory(self) -> None:
        with pytest.raises(ConfigError, match=r"memory_fraction is a share of a device's memory.* not all ours"):
            resolve(ServeConfig(memory_fraction=0.5), CPU)

    def test_memory_fraction(self) -> None:
        half, all_of_it = (resolve(ServeConfig(memory_fraction=share), TPU).num_pages for share in (0.6, 1.0))
        assert half < all_of_it


def test_a_config_is_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        ServeConfig().port = 1  # type: ignore[misc]  # what is tested


class TestMeshShape:
    def test_round_trip(self) -> None:
        shape = MeshShape.parse("tensor=8, data=1")
        assert shape == MeshShape(tensor=8)
        assert MeshShape.parse(str(shape)) == shape
        assert shape.num_devices == 8

    @pytest.mark.parametrize("mesh", ["data=2,tensor=8", "expert=2"])
    def test_axes_that_would_split_nothing_are_refused(self, mesh: str) -> None:
        with pytest.raises(ConfigError, match=r"mesh.*=2: .*use tensor=N"):
            load({"mesh": mesh}, environ={})


class TestEnvironment:
    def test_the_cache_directory(self, tmp_path: Path) -> None:
        assert cache_dir({"JAXSERVE_CACHE": "/own", "XDG_CACHE_HOME": "/xdg"}) == Path("/own")
        assert cache_dir({"XDG_CACHE_HOME": "/xdg"}) == Path("/xdg/jaxserve")
        assert cache_dir({}) == Path.home() / ".cache" / "jaxserve"

    def test_its_variable_is_not_an_unknown_setting(self) -> None:
        assert load({}, environ={"JAXSERVE_CACHE": "/own"}) == ServeConfig()

    def test_what_the_cluster_says(self) -> None:
        environ = {"TPU_WORKER_ID": "1", "LWS_GROUP_SIZE": "", "PATH": "/bin"}
        assert cluster_environment(environ) == {"TPU_WORKER_ID": "1"}
