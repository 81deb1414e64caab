"""Processes that render templates: what a template may take, who waits for whom, and that none is left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType

import pytest

from jaxserve.core.errors import UnavailableError
from jaxserve.text import template_pool
from jaxserve.text.template_pool import LARGE_BYTES, Failure, TemplateFailedError, TemplatePool

TWICE = "{% set ns = namespace(x=[1], y=[1]) %}{% for i in range(60) %}"
SHARED_LISTS = (
    f"{TWICE}{{% set ns.x = [ns.x, ns.x] %}}{{% set ns.y = [ns.y, ns.y] %}}{{% endfor %}}{{{{ ns.x == ns.y }}}}"
)
"""One comparison that takes 2**60 steps."""

SLOW = "{% if slow %}" + SHARED_LISTS + "{% endif %}done"
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, or limits address space")


@pytest.fixture
def pool() -> Iterator[TemplatePool]:
    pool = TemplatePool(max_workers=4, patience_s=30.0)
    yield pool
    pool.close()


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process is there and not only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "source",
    [
        SHARED_LISTS,
        f"{TWICE}{{% set ns.x = [ns.x, ns.x] %}}{{% endfor %}}{{{{ ns.x }}}}",
        f"{TWICE}{{% set ns.x = ns.x + ns.x %}}{{% endfor %}}",
        f"{TWICE}{{% set ns.y = ns.y ~ ns.y %}}{{% endfor %}}",
        f"{TWICE}{{% set ns.y %}}{{{{ ns.y }}}}{{{{ ns.y }}}}{{% endset %}}{{% endfor %}}",
        "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | map('string') | join | length }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{{ big * 'a' }}",
        "{{ (9 ** big) > 1 }}",
        "{{ 'a'.center(big) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a\nb' | indent(big) }}",
        "{{ [1] | tojson(indent=big) }}",
        "{{ [1] | batch(big, 0) | list }}",
        "{{ '%*d' % (big, 1) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '{:{}}'.format(1, big) }}",
        "{{ ('a' * 99999999).replace('', 'a' * 99999999) | length }}",
    ],
)
@on_linux
def test_a_template_that_takes_too_much_is_stopped(pool: TemplatePool, source: str) -> None:
    with pytest.raises(TemplateFailedError) as caught:
        pool.render(source, b'{"big": 9999999999}', timeout_s=0.3)
    assert caught.value.kind is Failure.EXCEEDED
    assert pool.pids == ()
    assert pool.render("{{ x }}", b'{"x": 1}', timeout_s=5) == "1"


def test_compiling_is_bounded_too(pool: TemplatePool) -> None:
    with pytest.raises(TemplateFailedError) as caught:
        pool.compile("{{ 9 ** (9 ** 9) }}", timeout_s=0.3)
    assert caught.value.kind is Failure.EXCEEDED


def test_output_is_bounded(pool: TemplatePool) -> None:
    with pytest.raises(TemplateFailedError, match="the output grows past") as caught:
        pool.render("{% for i in range(9999) %}{{ 'a' * 9999 }}{% endfor %}", b"{}", timeout_s=20)
    assert caught.value.kind is Failure.FORBIDDEN


def test_memory_may_grow_with_the_input(pool: TemplatePool) -> None:
    """8 MB of empty lists, the most objects that a body of that size can bring, take more than a template may."""
    lists = b"[]," * 2_700_000
    assert pool.render("{{ x | length }}", b'{"x": [%s0]}' % lists, timeout_s=60) == "2700001"


def test_what_one_conversation_leaves_behind_does_not_count_against_the_next(pool: TemplatePool) -> None:
    """An exception and what its frames hold are a cycle that waits for garbage collection."""
    for _ in range(3):
        with pytest.raises(TemplateFailedError) as caught:
            pool.render("{% set x = 'a' * size %}{{ 1 // 0 }}", b'{"size": 300000000}', timeout_s=20)
        assert caught.value.kind is Failure.RAISED


def test_failures_leave_the_process_in_use(pool: TemplatePool) -> None:
    for source, kind in (
        ("{% if %}", Failure.INVALID),
        ("{{ 1 // 0 }}", Failure.RAISED),
        ("{{ ''.__class__.x }}", None),
    ):
        with pytest.raises(TemplateFailedError) as caught:
            pool.render(source, b"{}", timeout_s=20)
        assert caught.value.kind is (kind or Failure.FORBIDDEN)
    assert len(pool.pids) == 1


def test_long_conversations_leave_processes_to_short_ones(pool: TemplatePool) -> None:
    padding = b"x" * LARGE_BYTES
    with ThreadPoolExecutor(4) as threads:
        slow = [
            threads.submit(pool.render, SLOW, b'{"slow": true, "x": "%s"}' % padding, timeout_s=1.5) for _ in range(4)
        ]
        until(lambda: len(pool.pids) == 2)
        for _ in range(3):
            assert pool.render(SLOW, b"{}", timeout_s=20) == "done"
        assert not any(each.done() for each in slow[2:])
        assert all(isinstance(each.exception(), TemplateFailedError) for each in slow)


def test_who_waits_too_long_is_told() -> None:
    pool = TemplatePool(max_workers=1, patience_s=0.2)
    with ThreadPoolExecutor(1) as threads:
        slow = threads.submit(pool.render, SLOW, b'{"slow": true}', timeout_s=1)
        until(lambda: len(pool.pids) == 1)
        with pytest.raises(UnavailableError, match=r"busy for 0.2 s; try again later\."):
            pool.render(SLOW, b"{}", timeout_s=20)
        assert isinstance(slow.exception(), TemplateFailedError)
    assert pool.render(SLOW, b"{}", timeout_s=20) == "done"
    pool.close()


@on_linux
def test_close_ends_renderings_and_processes(pool: TemplatePool) -> None:
    pool.render(SLOW, b"{}", timeout_s=20)
    with ThreadPoolExecutor(2) as threads:
        slow = [threads.submit(pool.render, SLOW, b'{"slow": true}', timeout_s=60) for _ in range(2)]
        until(lambda: len(pool.pids) == 2)
        pids = pool.pids
        pool.close()
        for each in slow:
            with pytest.raises(UnavailableError, match="is closed"):
                each.result(30)
    assert not any(runs(pid) for pid in pids)
    assert pool.pids == ()
    with pytest.raises(UnavailableError, match="is closed"):
        pool.render(SLOW, b"{}", timeout_s=20)
    pool.close()


@on_linux
def test_a_pool_that_nobody_holds_leaves_nothing() -> None:
    pool = TemplatePool()
    pool.render(SLOW, b"{}", timeout_s=20)
    [pid] = pool.pids
    del pool
    gc.collect()
    assert not runs(pid)


def test_a_process_that_somebody_killed_is_replaced(pool: TemplatePool) -> None:
    pool.render(SLOW, b"{}", timeout_s=20)
    [pid] = pool.pids
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.1)
    assert pool.render(SLOW, b"{}", timeout_s=20) == "done"
    assert pid not in pool.pids


def test_an_interrupted_rendering_does_not_answer_the_next(pool: TemplatePool) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    pool.render(SLOW, b"{}", timeout_s=20)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            pool.render(SLOW, b'{"slow": true}', timeout_s=60)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert pool.render("{{ x }}", b'{"x": "next"}', timeout_s=20) == "next"


@on_linux
@pytest.mark.parametrize("slow", ["false", "true"])
def test_processes_end_with_their_parent(slow: str) -> None:
    """Even if it is killed while a template is in the middle of what never ends."""
    script = (
        "import threading, time\n"
        "from jaxserve.text.template_pool import TemplatePool\n"
        "pool = TemplatePool()\n"
        "pool.compile('x', timeout_s=20)\n"
        f"ask = lambda: pool.render({SLOW!r}, b'{{\"slow\": {slow}}}', timeout_s=1)\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "time.sleep(0.3)\n"
        "print(*pool.pids, flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        [pid] = map(int, parent.stdout.readline().split())
        assert runs(pid)
        parent.kill()
    until(lambda: not runs(pid))


@on_linux
def test_processes_inherit_nothing(pool: TemplatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXSERVE_API_KEY", "secret")
    pool.render(SLOW, b"{}", timeout_s=20)
    [pid] = pool.pids
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    targets = [os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir()]
    assert len(targets) <= 5
    assert {target.partition(":")[0] for target in targets} <= {"socket", "pipe", "/dev/null", f"/proc/{pid}/statm"}
    assert os.getsid(pid) == pid


def test_no_process_can_be_started(pool: TemplatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(template_pool.subprocess, "Popen", refuse)
    with pytest.raises(UnavailableError, match=r"No process can be started .*: Resource temporarily unavailable\."):
        pool.render(SLOW, b"{}", timeout_s=20)


def test_a_process_that_does_not_come_up_says_why(pool: TemplatePool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_pool, "_BOOT", "raise SystemExit('no jinja here')")
    with pytest.raises(UnavailableError, match=r"did not start \(exit code 1\): no jinja here"):
        pool.render(SLOW, b"{}", timeout_s=20)
    assert pool.pids == ()
