"""Training beside other programs: processes that we start let their threads sleep, and who starts one himself is told."""

import os
import subprocess
import sys

import psutil
import pytest

from ovs3d_nerfstudio.engine import threads


@pytest.fixture
def spinning(monkeypatch):
    monkeypatch.delenv(threads.VARIABLE, raising=False)


def test_other_programs_are_seen_at_work(spinning):
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(psutil.cpu_count())]
    try:
        hint = threads.busy_hint(threads=2)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert hint is not None and "OMP_WAIT_POLICY=PASSIVE" in hint


def test_nothing_is_said_on_an_idle_machine_or_to_who_has_one_thread_or_has_chosen(spinning, monkeypatch):
    used = 0.0
    monkeypatch.setattr(psutil, "cpu_percent", lambda seconds: used)
    assert threads.busy_hint(threads=2) is None
    used = 100.0
    assert threads.busy_hint(threads=2) is not None
    assert threads.busy_hint(threads=1) is None
    monkeypatch.setenv(threads.VARIABLE, "ACTIVE")
    assert threads.busy_hint(threads=2) is None
    threads.let_sleep()
    assert os.environ[threads.VARIABLE] == "ACTIVE"
