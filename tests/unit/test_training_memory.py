"""Memory that a training frees stays with it."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys

import pytest

from leafseg.training.memory import keep_freed_memory

# Pages that the system had to map anew while one block is freed and asked for again.
_FAULTS = """
import resource, sys
from leafseg.training.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def again():
    blocks = [bytearray(24 * 2**20) for _ in range(4)]  # more than glibc keeps by itself
    for block in blocks:
        for page in range(0, len(block), 4096):
            block[page] = 1
for _ in range(3):
    again()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    again()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the switch")
def test_a_block_that_is_freed_and_asked_for_again_is_not_mapped_anew() -> None:
    assert resource.getpagesize() >= 4096
    faults = {}
    for how in ("plain", "keep"):
        done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    blocks = 20 * 4 * 24 * 2**20 // resource.getpagesize()  # pages, if each were mapped each time
    assert faults["keep"] < blocks / 20 < blocks / 2 < faults["plain"], faults


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False
