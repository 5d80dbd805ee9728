"""What the loss adds to a whole training step: ``python -m bench.share`` (extra models).

A SegFormer student learns from a frozen SegFormer teacher: both forward passes, task loss, distillation loss on the four levels
of the encoder, backward, SGD. Steps with ours, with the literal formulas and with no distillation loss take turns, so a
disturbance meets them all; a loss's share is the part of its step that the step without loss does not take. Both models are
randomly initialised: the time is that of trained ones.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy, interpolate

from maskd_triton import MaskedDistillLoss, MaskLearner, reference

from . import environment

CLASSES = 19
STUDENT = {"hidden_sizes": [32, 64, 160, 256], "depths": [2, 2, 2, 2], "decoder_hidden_size": 256}  # B0
TEACHER = {"hidden_sizes": [64, 128, 320, 512], "depths": [3, 4, 6, 3], "decoder_hidden_size": 768}  # B2


def segformer(sizes: dict[str, Any]) -> nn.Module:
    try:
        from transformers import SegformerConfig, SegformerForSemanticSegmentation
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "bench.share needs transformers: pip install 'maskd-triton[models]'", name=error.name
        ) from error
    return SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, **sizes))


Loss = Callable[[list[Tensor], list[Tensor]], Tensor]


def losses(device: torch.device) -> tuple[dict[str, Loss | None], nn.Module]:
    """The distillation losses by name, and the criterion, whose align convolutions all of them train."""
    wide, narrow = TEACHER["hidden_sizes"], STUDENT["hidden_sizes"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner = MaskLearner(wide).to(device).requires_grad_(False)
        criterion = MaskedDistillLoss(wide, student_channels=narrow, pretrained=learner).to(device)
    tokens = [m.mask_token for m in learner.mask_modules]
    weighting = [m.weighting() for m in learner.mask_modules]

    def literal(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        aligned = [conv2d(s, a.weight.to(s.dtype), a.bias.to(s.dtype)) for s, a in zip(student, criterion.align, strict=True)]
        return reference.distill_loss(aligned, teacher, tokens, weighting, custom_mask=True)

    return {"no distillation loss": None, "ours": criterion, "literal": literal}, criterion


def measure(device: torch.device, side: int, batch: int, rounds: int, dtype: torch.dtype | None) -> dict[str, list[float]]:
    """Milliseconds of every round's step, by loss."""
    torch.manual_seed(0)
    student, teacher = segformer(STUDENT).to(device).train(), segformer(TEACHER).to(device).eval()
    found, criterion = losses(device)
    optimizer = torch.optim.SGD([*student.parameters(), *criterion.parameters()], lr=1e-3)
    images = torch.randn(batch, 3, side, side, device=device)
    labels = torch.randint(CLASSES, (batch, side, side), device=device)

    def step(loss: Loss | None) -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            with torch.no_grad():
                features = teacher.segformer(images, output_hidden_states=True).hidden_states
            out = student(images, output_hidden_states=True)
            total = cross_entropy(interpolate(out.logits.float(), size=labels.shape[1:], mode="bilinear"), labels)
            if loss is not None:
                total = total + loss(list(out.hidden_states), list(features))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    times: dict[str, list[float]] = {name: [] for name in found}
    for i in range(rounds + 1):
        for name, loss in found.items():
            begun = time.perf_counter()
            step(loss)
            if i:  # the first round warms up
                times[name].append(1000 * (time.perf_counter() - begun))
    return times


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.share", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, help="pixels of an image's side; default 512 on a GPU, 256 on a CPU")
    parser.add_argument("--batch", type=int, help="images; default 8 on a GPU, 2 on a CPU")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: under autocast")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    device = torch.device(args.device)
    gpu = device.type == "cuda"
    side, batch = args.side or (512 if gpu else 256), args.batch or (8 if gpu else 2)
    times = measure(device, side, batch, args.rounds, torch.bfloat16 if args.dtype == "bf16" else None)
    bare = times["no distillation loss"]
    rows = {}
    for name, values in times.items():
        shares = [100 * (1 - b / v) for b, v in zip(bare, values, strict=True)]
        rows[name] = {"median_ms": statistics.median(values), "share_percent": statistics.median(shares)}
        print(f"{name:22}{rows[name]['median_ms']:10.1f} ms a step, of which the loss {rows[name]['share_percent']:5.1f} %")
    if args.out:
        facts = environment.describe(device, ("torch", "triton", "numpy", "transformers"))
        settings = {"side": side, "batch": batch, "rounds": args.rounds, "dtype": args.dtype}
        args.out.write_text(json.dumps(facts | {"settings": settings, "steps": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
