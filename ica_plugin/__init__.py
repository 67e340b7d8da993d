"""In-Context Approximation data reweighting for Axolotl, LLaMA-Factory, transformers and TRL."""

from typing import TYPE_CHECKING, Any

from .config import ICAConfig
from .errors import ICAError

if TYPE_CHECKING:
    from .hosts.axolotl.plugin import ICAPlugin
    from .hosts.trainer import attach

__version__ = "0.1.0"
__all__ = ["ICAConfig", "ICAError", "ICAPlugin", "attach"]


def __getattr__(name: str) -> Any:
    # Each host's module is imported only where that host is used.
    if name == "ICAPlugin":
        from .hosts.axolotl.plugin import ICAPlugin

        return ICAPlugin
    if name == "attach":
        from .hosts.trainer import attach

        return attach
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
