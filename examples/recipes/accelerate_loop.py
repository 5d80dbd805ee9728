"""accelerate: one prepared module holds student and criterion. Extra: ``recipes``.

accelerate launch -m examples.recipes.accelerate_loop
"""

import torch

from examples.recipes import EXTRA, missing
from examples.recipes.plain import build
from examples.recipes.tiny import batches

try:
    from accelerate import Accelerator
except ModuleNotFoundError as error:
    raise missing(error, EXTRA) from None


def main(steps: int = 6) -> list[float]:
    """Train with gradients accumulated over two batches; the losses of every batch."""
    accelerator = Accelerator(gradient_accumulation_steps=2)  # mixed_precision="bf16" or "fp16" works as well
    model = build()  # the teacher inside follows to the device; no find_unused_parameters needed, tokens are frozen
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.01)
    loader = torch.utils.data.DataLoader(list(batches(steps)), batch_size=None)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = model(images, labels, advance=accelerator.sync_gradients)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    student = accelerator.unwrap_model(model).student  # export: student.state_dict()
    assert not any(name.startswith("criterion") for name in student.state_dict())
    return losses


if __name__ == "__main__":
    print(main())
