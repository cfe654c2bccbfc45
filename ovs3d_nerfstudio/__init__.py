"""Weakly supervised, open-vocabulary 3D segmentation (3D-OVS) for nerfstudio.

    import ovs3d_nerfstudio as ovs3d
    run = ovs3d.load_run("outputs/…")

What is called from Python is imported when it is first asked for: whoever needs the version alone does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovs3d_nerfstudio.catalogue import write_catalogue
    from ovs3d_nerfstudio.errors import UserError
    from ovs3d_nerfstudio.run import Run, load_run

__version__ = "0.2.0"
__all__ = ["Run", "UserError", "__version__", "load_run", "write_catalogue"]

_HOMES = {"Run": "run", "load_run": "run", "write_catalogue": "catalogue", "UserError": "errors"}
"""The module of each name that others may call."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
