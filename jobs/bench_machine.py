"""The machine that a benchmark ran on."""

import os
import platform
from pathlib import Path
from typing import Any


def machine(cpus: int) -> dict[str, Any]:
    """What the numbers hold for."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        named = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = named[0] if named else cpu
    return {"cpu": cpu, "cpus_used": cpus, "cpus": os.cpu_count(), "python": platform.python_version()}
