"""What a host prints is held back, unless something fails that nobody foresaw."""

import os
import subprocess
import sys

from ica_plugin.errors import ICAError
from ica_plugin.log import get_logger
from ica_plugin.tools.quiet import quiet


def after(what: str) -> subprocess.CompletedProcess:
    """This file run as a process of its own, whose streams are real ones."""
    return subprocess.run([sys.executable, __file__, what], capture_output=True, text=True)


def test_only_our_lines_and_the_verdict_are_seen():
    done = after("nothing")
    assert done.stdout == "verdict\n" and done.stderr == "[ica] ours\n" and done.returncode == 0


def test_an_expected_error_shows_no_noise_and_an_unexpected_one_all():
    done = after("ICAError")
    assert done.stdout == "" and done.stderr.startswith("[ica] ours\nTraceback") and "from" not in done.stdout
    done = after("KeyError")
    noise = done.stderr[: done.stderr.index("Traceback")].splitlines()
    assert done.stdout == "" and sorted(noise) == ["[ica] ours", "from a child", "from python", "past python"]


def test_verbose_holds_nothing_back():
    done = after("verbose")
    assert sorted(done.stdout.splitlines()) == ["from a child", "from python", "past python", "verdict"]


if __name__ == "__main__":
    with quiet(verbose=sys.argv[1] == "verbose"):
        print("from python")
        os.write(1, b"past python\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"], check=True)
        get_logger().warning("ours")
        if sys.argv[1] == "ICAError":
            raise ICAError("what is wrong")
        if sys.argv[1] == "KeyError":
            raise KeyError("attention_mask")
    print("verdict")
