"""Warn where a host's version is outside the range that is tested."""

from __future__ import annotations

from importlib.metadata import version

from packaging.version import Version

from .log import get_logger

# host: (oldest tested, first untested)
TESTED = {"axolotl": ("0.19.0", "0.22"), "llamafactory": ("0.9.5", "0.9.6"), "trl": ("0.24.0", "1.15")}


def warn_if_untested(host: str) -> None:
    """Log a warning that names the tested range if the installed version of `host` is outside it."""
    oldest, newest = TESTED[host]
    found = Version(version(host))
    if not Version(oldest) <= found < Version(newest):
        get_logger().warning(
            "%s %s is outside the tested range (%s ≤ version < %s). Exactness guards stay on; if a run stops with an error "
            "from ica_plugin, install a tested version.",
            host,
            found,
            oldest,
            newest,
        )
