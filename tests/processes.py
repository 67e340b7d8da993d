"""Commands of a host, run to their end; one that hangs says where."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent


def run(*arguments: object, timeout: float = 300, **variables: str) -> subprocess.CompletedProcess:
    """Run a command of this environment (or of any path); its output is captured.

    Raises:
        AssertionError: it did not end in `timeout` seconds. The message has its output, with the stack of every process that
            it had started.
    """
    program, *rest = map(str, arguments)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }
    process = subprocess.Popen(
        [str(BIN / program), *rest], env=environment | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        # torchrun starts its workers in sessions of their own, so they outlive it unless each is told.
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(signal.SIGABRT)  # which makes Python's faulthandler print the stacks
            time.sleep(0.3)  # one after the other
        out, errors = process.communicate(timeout=60)
        raise AssertionError(f"{program} did not end in {timeout} s:\n{out[-4000:]}\n{errors[-12000:]}") from None
    return subprocess.CompletedProcess([program, *rest], process.returncode, out, errors)


def torchrun(script: str, processes: int, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script on several processes of this machine, with this folder's modules."""
    paths = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
    launcher = (
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        processes,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        "localhost:0",
    )
    return run("python", *launcher, script, *arguments, PYTHONPATH=paths)
