"""Against the official implementation's float64 figures in tests/data."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import default_dtype, in_layout

from maskd_triton import MaskedDistillLoss, MaskModule

DATA = Path(__file__).parent / "data"
pytestmark = pytest.mark.usefixtures("large_tiles")
DISTILL = sorted(p.stem for p in DATA.glob("*.npz") if not p.stem.startswith("learn"))
LEARN = sorted(p.stem for p in DATA.glob("learn*.npz"))


def parameters(data: np.lib.npyio.NpzFile) -> dict[str, torch.Tensor]:
    return {k.removeprefix("param:"): torch.tensor(data[k]) for k in data.files if k.startswith("param:")}


def criterion_for(data: np.lib.npyio.NpzFile, segmentation: bool, impl: str, dtype: torch.dtype) -> MaskedDistillLoss:
    levels = sum(k.startswith("student_") for k in data.files)
    with default_dtype(dtype):
        return MaskedDistillLoss(
            [data[f"student_{i}"].shape[1] for i in range(levels)],
            int(data["num_tokens"]),
            weight_mask=not segmentation and bool(data["weight_mask"]),
            custom_mask=not segmentation and bool(data["custom_mask"]),
            custom_mask_warmup=0,
            loss_weight=0.5 if segmentation else float(data["loss_weight"]),
            eps=1e-5 if segmentation else 1e-12,
            pretrained=parameters(data),
            impl=impl,
        )


# All pairs of dtypes and layouts are in the table of cases (test_numbers.py)
PRECISE, ROUNDED = (torch.float64, 1e-10, "nchw"), (torch.float32, 2e-5, "channels_last")
PRECISIONS = pytest.mark.parametrize(("dtype", "bound", "layout"), [PRECISE, ROUNDED], ids=["fp64-nchw", "fp32-channels_last"])


@PRECISIONS
@pytest.mark.parametrize("name", DISTILL)
def test_distill(name: str, dtype: torch.dtype, bound: float, layout: str, target: tuple[str, str]) -> None:
    impl, device = target
    data = np.load(DATA / f"{name}.npz")
    criterion = criterion_for(data, name.startswith("segmentation"), impl, dtype).to(device)
    levels = range(len(criterion.channels))
    load = lambda key: in_layout(torch.tensor(data[key]).to(device, dtype), layout)  # noqa: E731
    student = [load(f"student_{i}").requires_grad_() for i in levels]
    loss = criterion(student, [load(f"teacher_{i}") for i in levels])
    loss.backward()
    assert loss.dtype == dtype
    assert abs(loss.item() / float(data["loss"]) - 1) < bound
    for i in levels:
        expected = data[f"grad_student_{i}"]
        error = np.abs(student[i].grad.cpu().numpy() - expected).max()
        assert error < bound * np.abs(expected).max(), f"level {i}"
        strides = zip(student[i].shape, student[i].grad.stride(), student[i].stride(), strict=True)
        assert all(got == given for size, got, given in strides if size > 1)


@pytest.mark.parametrize("name", DISTILL)
def test_masks_and_weights(name: str) -> None:
    data = np.load(DATA / f"{name}.npz")
    criterion = criterion_for(data, name.startswith("segmentation"), "eager", torch.float64)
    for i, module in enumerate(criterion.mask_modules):
        teacher = torch.tensor(data[f"teacher_{i}"]).double()
        masks = module.masks(teacher)
        np.testing.assert_allclose(masks.numpy(), data[f"masks_{i}"], rtol=1e-10)
        if criterion.weight_mask:
            np.testing.assert_allclose(module.weights(teacher).numpy(), data[f"mask_weights_{i}"], rtol=1e-10)


@PRECISIONS
@pytest.mark.parametrize("name", LEARN)
def test_learn(name: str, dtype: torch.dtype, bound: float, layout: str, target: tuple[str, str]) -> None:
    impl, device = target
    data = np.load(DATA / f"{name}.npz")
    x = in_layout(torch.tensor(data["features"]).to(device, dtype), layout).requires_grad_()
    module = MaskModule(x.shape[1], int(data["num_tokens"]), bool(data["weight_mask"]), impl=impl).to(device, dtype)
    module.load_state_dict({k: v.to(dtype) for k, v in parameters(data).items()})
    y, dice = module(x)
    ((y * torch.tensor(data["grad_output"]).to(device, dtype)).sum() + float(data["dice_scale"]) * dice).backward()
    assert abs(dice.item() - float(data["dice"])) <= bound * float(data["dice"])
    results = [(y, "output"), (x.grad, "grad_features"), *((p.grad, f"grad:{k}") for k, p in module.named_parameters())]
    for value, key in results:
        error = np.abs(value.detach().cpu().numpy() - data[key]).max()
        assert error <= bound * np.abs(data[key]).max(), key
