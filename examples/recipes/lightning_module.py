"""Lightning: the criterion as an attribute, the teacher outside of the checkpoint. Extra: ``recipes``.

python -m examples.recipes.lightning_module
"""

import torch
from torch import Tensor

from examples.recipes import EXTRA, missing
from examples.recipes.plain import Distillation, build
from examples.recipes.tiny import batches

try:
    import lightning
except ModuleNotFoundError as error:
    raise missing(error, EXTRA) from None


class Module(lightning.LightningModule):
    """Under DDP the whole module is wrapped, so the align convolutions are in it; nothing is unused."""

    def __init__(self) -> None:
        super().__init__()
        self.distillation: Distillation = build()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # the warm-up counts optimiser steps
        last = (batch_idx + 1) % self.trainer.accumulate_grad_batches == 0
        loss = self.distillation(*batch, advance=last)
        if batch_idx % 2 == 0:  # waits for the device: not in every step of a real run
            for name, level in self.distillation.criterion.diagnostics().items():
                self.log(f"distill/{name}", level.loss)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=0.01)


def main(steps: int = 6) -> list[float]:
    """Train for so many batches; the losses."""
    module = Module()
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="auto", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(list(batches(steps)), batch_size=None))
    return module.losses


if __name__ == "__main__":
    print(main())
