"""A slim trainer for audio ViTs with the AaPE stem: masked teacher–student pre-training, and what follows it."""

import sys
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules by the folder that they moved to when there was only one; scripts with the old names still work.
FOLDERS = {
    "method": ("model", "masks", "objective", "diagnostics"),
    "sound": ("audio", "sources", "loader", "data"),
    "saved": ("checkpoints", "pretrained"),
    "evaluation": ("embedding", "probe", "commands"),
    "training": ("finetuning", "optimisation", "sharding", "monitor", "runs"),
    "demo": ("stems", "picture"),
}
MOVED = {name: f"{folder}.{name}" for folder, names in FOLDERS.items() for name in names}
MOVED |= {"pretrain": "training.commands", "finetune": "training.commands"}


class _Moved(MetaPathFinder, Loader):
    """Imports a module under its old name."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, old = name.rpartition(".")
        return ModuleSpec(name, self) if package == __name__ and old in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = import_module(f"{__name__}.{MOVED[spec.name.rpartition('.')[2]]}")
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # the import machinery has set that of the old name
        module.__spec__ = self._spec


sys.meta_path.append(_Moved())
