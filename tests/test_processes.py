import subprocess
import sys

import psutil
import pytest

from processes import run

PARENT = """
import subprocess, sys, time
STUCK = "def stuck():\\n    import time; time.sleep(600)\\nstuck()"
child = subprocess.Popen([sys.executable, "-c", STUCK], start_new_session=True)
print(child.pid, flush=True)
child.wait()
"""


def test_a_command_that_hangs_says_where_and_leaves_nothing_behind():
    with pytest.raises(AssertionError, match="did not end in 5 s") as caught:
        run(sys.executable, "-c", PARENT, timeout=5)
    message = str(caught.value)
    assert "in stuck" in message
    child = int(message.splitlines()[1])
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_output_and_exit_status():
    done = run("python", "-c", "import os, sys; print(os.environ['NAME']); sys.exit(3)", NAME="value")
    assert isinstance(done, subprocess.CompletedProcess) and (done.returncode, done.stdout) == (3, "value\n")
