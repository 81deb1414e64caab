"""`jaxserve compile`: what it prints of a bundle."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.cli import main
from jaxserve.launch.compile import Written


@pytest.mark.parametrize(("flags", "signed"), [((), ""), (("--key", "secret"), " --bundle-key secret")])
def test_the_line_that_serves_it(
    flags: tuple[str, ...], signed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(model: str, topology: str, out: Path, **_: object) -> Written:
        return Written(topology=topology, num_programs=3, num_bytes=1 << 20, settings={})

    monkeypatch.setattr("jaxserve.launch.compile.compile_bundle", compiled)
    assert main(["compile", "a-model", "--topology", "v6e:1x1", "--out", "made", *flags]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "made: 3 programs for v6e:1x1, 1.0 MiB.",
        f"jaxserve serve a-model --bundle made{signed}",
    ]
