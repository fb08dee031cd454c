"""`RAY_START_HOOK` of the suite's Ray head and of nodes that join it: they start only the processes that tests use.

Otherwise a head has seventeen processes, uses 7 s of CPU to come up and 10 s in every minute after that. A private Ray, which other tests
start, is left as users have it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from ray._private import ray_constants, services

DASHBOARD_MODULES = "--modules-to-load=JobHead,NodeHead,UsageStatsHead"  # for `ray job submit`
LAUNCHER = Path(__file__).with_name("ray_worker_launcher.py")
WORKER_COMMAND = "--python_worker_command="


def prepare(parameters: Any, head: bool) -> None:
    """Called by `ray start` with its `RayParams` before it starts processes."""
    if head:
        parameters.ray_client_server_port = None
    start = services.start_ray_process

    def start_less(command: list[str], process_type: str, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            command = [*command, DASHBOARD_MODULES]
        if process_type == ray_constants.PROCESS_TYPE_RAYLET:
            launch = subprocess.list2cmdline([sys.executable, "-S", "-E", str(LAUNCHER), sys.executable])
            ours, theirs = WORKER_COMMAND + launch, WORKER_COMMAND + subprocess.list2cmdline([sys.executable])
            changed = [argument.replace(theirs, ours, 1) for argument in command]
            assert changed != command, command
            command = changed
        return start(command, process_type, **options)

    services.start_ray_process = start_less
