"""`aape-ssl finetune`: a run of `FinetuningModule` on labelled clips; the best epoch is exported, and tested once."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray

from ._lightning import Callback, LightningArgumentParser, ModelCheckpoint
from .checkpoints import AtomicCheckpointIO
from .finetuning import FinetuningModule, LabelledClips
from .pretrained import AudioEncoder
from .probe import interval
from .runs import Run

__all__ = ["Finetune", "mean_average_precision", "predict"]


def mean_average_precision(scores: NDArray[np.float32], targets: NDArray[np.float32]) -> float:
    """Average precision of each class, averaged over the classes that occur in targets; both (clips, classes)."""
    from sklearn.metrics import average_precision_score

    occur = targets.any(0)
    return float(average_precision_score(targets[:, occur], scores[:, occur], average="macro"))


@torch.inference_mode()
def predict(encoder: AudioEncoder, data: LabelledClips, device: torch.device | str = "cpu") -> NDArray[np.float32]:
    """Logits (clips, classes) of the clips that are held out."""
    encoder = encoder.to(device).eval()
    return torch.cat([encoder(batch["log_mel"].to(device)).cpu() for batch in data.windows(data.test)]).numpy()


class Finetune(Run):
    """Leaves `model`, an exported folder, beside checkpoints and logs."""

    command = "finetune"
    module_type = FinetuningModule
    data_type = LabelledClips
    of_the_trainer = MappingProxyType({"max_epochs": 50})

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The data is prepared as the checkpoint wants it."""
        super().add_arguments_to_parser(parser)
        parser.link_arguments("model.checkpoint", "data.checkpoint")

    def own_callbacks(self) -> list[Callback]:
        """The epoch that is best on validation."""
        name = "map" if self.config.data.multi_label else "accuracy"
        self.best = ModelCheckpoint(
            self.config.out, "best", f"valid/{name}", mode="max", save_weights_only=True, enable_version_counter=False
        )
        return [self.best]

    def summary(self) -> dict[str, str]:
        """Validation and test of the exported encoder."""
        module, data = self.model, self.datamodule
        prefix = "model."
        best = self.best.best_model_score
        if best is None:
            raise ValueError(f"max_steps: no epoch ended in {self.trainer.global_step} steps, so nothing was validated")
        state = AtomicCheckpointIO().load_checkpoint(self.best.best_model_path)["state_dict"]
        module.model.load_state_dict(
            {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        )
        folder = self.config.out / "model"
        module.model.save_pretrained(folder)
        # what is tested is what was written
        logits = predict(AudioEncoder.from_pretrained(folder), data, self.trainer.strategy.root_device)
        targets = data.targets(data.test).numpy()
        rows = {"exported": str(folder), f"valid/{module.name}": f"{float(best):.4f}"}
        if data.multi_label:
            return {**rows, "test/map": f"{mean_average_precision(logits, targets):.4f}"}
        correct = (logits.argmax(1) == targets.argmax(1)).astype(float)
        low, high = interval(correct, [clip.group or clip.name for clip in data.test])
        return {**rows, "test/accuracy": f"{correct.mean():.4f}, 95 % interval {low:.4f} – {high:.4f}"}
