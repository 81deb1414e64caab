"""`jaxserve plan` as a user meets it: what is refused at once, and what it says when nothing fits."""

from __future__ import annotations

import pytest

from jaxserve.cli import main
from jaxserve.core.errors import ConfigError

LLAMA = "llama-3.3-70b"
TOPOLOGY = ("--topology", "v6e:2x4")


def test_all_compilers_are_asked_for_before_the_first_slice_is_compiled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def require(topology: object) -> None:
        asked.append(str(topology))
        if str(topology) == "h100:1":
            raise ConfigError("no compiler")

    asked: list[str] = []
    monkeypatch.setattr("jaxserve.sharding.topology.require_compiler", require)
    monkeypatch.setattr("jaxserve.launch.plan.plan", lambda *_, **__: pytest.fail("it was compiled"))
    assert main(["plan", LLAMA, *TOPOLOGY, "--topology", "h100:1", "--json"]) == 2
    assert asked == ["v6e:2x4", "h100:1"]
    assert capsys.readouterr().err == "jaxserve: no compiler\n"


def test_a_price_of_another_chip_is_not_dropped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, *TOPOLOGY, "--price", "v6e=1,h100=2"]) == 2
    assert "--price: none of the slices asked for is of h100;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--concurrency", "4096", "--input-len", "100000"), "with 4096 requests of 100256 tokens at once; try fewer"),
        (
            ("--mesh", "tensor=8", "--attention", "tpu", "--concurrency", "240", "--input-len", "7936"),
            "try fewer or shorter ones or --quantization int8 or another --mesh.",
        ),
        (("--mesh", "tensor=1"), "so, whatever the load; try --quantization int8 or another --mesh."),
        (("--num-pages", "10000000", "--quantization", "int8"), "so, whatever the load; try another --num-pages."),
    ],
)
def test_why_no_slice_holds_it(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, "--fit", *flags]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lengths", "1,abc"), "argument --lengths: 'abc' is no whole number"),
        (("--concurrency", "many"), "argument --concurrency: 'many' is no whole number"),
        (("--price", "many"), "argument --price: 'many' is no number; write 2.70"),
    ],
)
def test_words_for_numbers(flags: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", LLAMA, *TOPOLOGY, *flags])
    assert message in capsys.readouterr().err


def test_a_wrong_setting_does_not_send_to_another_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", LLAMA, *TOPOLOGY, "--page-size", "0"]) == 2
    error = capsys.readouterr().err
    assert "--page-size: '0' is not a whole number in [1, 1024]. --help describes them." in error


def test_help_names_models_without_weights(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "random:PRESET" in capsys.readouterr().out
