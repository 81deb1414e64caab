"""`jaxserve bench serve`: its flags, its table and its JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from openai_stub import Stub, serving

from jaxserve.bench.serve import Load
from jaxserve.cli import build_parser, main
from jaxserve.cli.bench.serve import plan_of

SMALL = ["--num-requests", "3", "--warmup", "0", "--input-len", "4", "--output-len", "2"]


def test_flags_become_a_plan() -> None:
    flags = (
        "bench serve --url u --endpoint chat --model m --api-key k --concurrency 1,8 --num-requests 5 --warmup 1 "
        "--seed 3 --input-len 10 --output-len 20 --spread 0.5 --prefix-len 4 --num-prefixes 2 --prompt-kind text "
        "--temperature 1 --no-ignore-eos --slo ttft=500 --slo tpot=50.5 --timeout 9"
    )
    plan = plan_of(build_parser().parse_args(flags.split()))
    assert (plan.url, plan.endpoint, plan.model, plan.api_key) == ("u", "chat", "m", "k")
    assert (plan.num_warmup, plan.seed) == (1, 3)
    assert plan.loads == (Load(concurrency=1), Load(concurrency=8))
    shape = plan.shape
    assert (shape.num_requests, shape.input_tokens, shape.output_tokens, shape.length_spread) == (5, 10, 20, 0.5)
    assert (shape.prefix_tokens, shape.num_prefixes) == (4, 2)
    assert (plan.prompt_kind, plan.temperature, plan.ignore_eos, plan.timeout_s) == ("text", 1.0, False, 9.0)
    assert plan.objective_ms == {"ttft": 500.0, "tpot": 50.5}
    assert plan_of(build_parser().parse_args(["bench", "serve", "--rate", "2.5"])).loads == (Load(rate=2.5),)


@pytest.mark.parametrize(
    "flags",
    [
        "--rate 1 --concurrency 1",
        "--rate 0",
        "--rate inf",
        "--concurrency 0",
        "--slo itl=3",
        "--slo ttft=x",
        "--spread 1",
    ],
)
def test_wrong_flags(flags: str) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", "serve", *flags.split()])
    assert left.value.code == 2


@pytest.mark.parametrize("flag", ["--spread", "--temperature", "--timeout", "--rate"])
def test_words_for_numbers(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "serve", flag, "much"])
    assert f"argument {flag}: 'much' is no number" in capsys.readouterr().err


def test_only_tpus_are_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "tune", "--topology", "h100:1"]) == 2
    assert "only TPUs' kernels have tiles to tune, and h100:1 has no TPU" in capsys.readouterr().err


def test_a_prompt_is_longer_than_its_prefix() -> None:
    assert main(["bench", "serve", "--input-len", "8", "--prefix-len", "8"]) == 2


def test_a_report_needs_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--output", str(tmp_path / "none" / "figures.json")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    with serving(Stub()) as stub:
        arguments = ["--concurrency", "1,2", "--json", "--output", str(out), *SMALL]
        assert main(["bench", "serve", "--url", stub.url, *arguments]) == 0
    text = capsys.readouterr().out
    assert out.read_text() == text
    runs = json.loads(text)["runs"]
    assert [run["load"] for run in runs] == ["c=1", "c=2"]
    assert [run["output_tokens"] for run in runs] == [6, 6]


def test_table_and_failures(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Stub(fault="status", fault_at=1)) as stub:
        assert main(["bench", "serve", "--url", stub.url, *SMALL]) == 1
    text = capsys.readouterr().out
    assert "2 / 1" in text
    assert "ttft p99, ms" in text
    assert "c=1: 1 failed: HTTP 503: overloaded" in text
