"""What is used of lightning. It imports torchvision where that is installed, also one built for another torch."""

from .libraries import mend_torchvision

mend_torchvision()

from lightning.fabric.plugins import CheckpointIO  # noqa: E402
from lightning.fabric.utilities.exceptions import MisconfigurationException  # noqa: E402
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer  # noqa: E402
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint  # noqa: E402
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI  # noqa: E402
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger  # noqa: E402
from lightning.pytorch.strategies import (  # noqa: E402
    FSDPStrategy,
    ModelParallelStrategy,
    ParallelStrategy,
    Strategy,
    StrategyRegistry,
)
from lightning.pytorch.utilities import rank_zero_warn  # noqa: E402
from torchmetrics.classification import MulticlassAccuracy, MultilabelAveragePrecision  # noqa: E402

__all__ = [
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "CheckpointIO",
    "FSDPStrategy",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "ModelCheckpoint",
    "ModelParallelStrategy",
    "MulticlassAccuracy",
    "MultilabelAveragePrecision",
    "ParallelStrategy",
    "Strategy",
    "StrategyRegistry",
    "TensorBoardLogger",
    "Trainer",
    "rank_zero_warn",
]
