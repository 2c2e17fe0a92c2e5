"""Freed memory that is kept: the same answers, in less CPU time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mgmtn.allocator import keep_freed_memory
from mgmtn.checkpoint import DEFAULT_MODEL

# Page faults, not seconds, tell whether memory was kept: they depend on nothing else that the machine does.
ALLOCATE = """
import resource, sys
from mgmtn.allocator import keep_freed_memory
if sys.argv[1] == "keeping":
    assert keep_freed_memory()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        bytearray(64 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
LABEL = """
import json, resource, sys, time
import numpy as np, torch
from mgmtn.allocator import keep_freed_memory
from mgmtn.checkpoint import Checkpoint
from mgmtn.labeller import Labeller
mode, model = sys.argv[1:]
if mode == "keeping":
    assert keep_freed_memory()
torch.set_num_threads(1)
labeller = Labeller(Checkpoint.load(model))
size = labeller.image_size
faces = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)
answers = labeller(faces)
before = time.process_time()
for _ in range(3):
    labeller(faces)
spent = (time.process_time() - before) / (3 * 64)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps({"ms": 1000 * spent, "peak_mb": peak, "sum": float(answers.sum())}))
"""


def python(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]).stdout


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_a_process_that_keeps_freed_memory_does_not_ask_the_kernel_for_it_again():
    assert int(python(ALLOCATE, "giving_back")) > 10_000
    assert int(python(ALLOCATE, "keeping")) < 1_000


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_than_on_linux_nothing_is_done_and_said_so(platform, monkeypatch):
    monkeypatch.setattr(sys, "platform", platform)
    assert keep_freed_memory() is False


@pytest.mark.bench
@pytest.mark.timeout(900)
def test_keeping_freed_memory_saves_cpu_time(capsys):
    """Three pairs of processes, one after the other: CPU time a face at batch 64 and peak memory."""
    pairs = [[json.loads(python(LABEL, mode, DEFAULT_MODEL)) for mode in ("keeping", "giving_back")] for _ in range(3)]
    time, memory = (sorted(keeping[what] / giving[what] for keeping, giving in pairs)[1] for what in ("ms", "peak_mb"))
    with capsys.disabled():
        print(f"\n{DEFAULT_MODEL}: {pairs[0]}\nCPU time {time:.2f}, peak memory {memory:.2f} of the plain allocator's")
    for keeping, giving in pairs:
        assert keeping["sum"] == giving["sum"]
