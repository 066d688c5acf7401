"""Imports a ComfyUI and this pack into the present process, for benchmarks that need no server."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Callable

ROOT = Path(__file__).resolve().parents[1]


def start(comfyui: str, arguments: tuple[str, ...] = ("--cpu",)) -> Callable[[str], ModuleType]:
    """Make ``comfy`` importable with these of its own arguments, and return an importer of the pack's modules.

    Args:
        comfyui: its folder; "" takes COMFYUI_PATH.
    """
    folder = Path(comfyui or os.environ.get("COMFYUI_PATH", ""))
    if not (folder / "main.py").is_file():
        raise SystemExit(f"--comfyui: expected a folder that holds ComfyUI's main.py, got {str(folder)!r}")
    own, sys.argv = sys.argv, [sys.argv[0], *arguments]
    sys.path.insert(0, str(folder))
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args  # noqa: F401  reads sys.argv once

    sys.argv = own
    import utils.extra_config  # noqa: F401  as main.py does: nodes.py puts comfy/, which has a utils.py, on the path

    import nodes  # noqa: F401  ComfyUI's own, before the pack's folder of that name could be found

    name = "editloss_pack"
    spec = importlib.util.spec_from_file_location(name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return lambda relative: importlib.import_module(f"{name}.{relative}")
