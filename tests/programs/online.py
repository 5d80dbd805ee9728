"""What ``test_tuning.py`` runs: a step of both stages, under ``MASKD_TRITON_AUTOTUNE`` with a clock to which all candidates are
alike; prints the kernels that were searched for."""

import sys

import torch
import triton

from maskd_triton import MaskedDistillLoss, MaskLearner


def main() -> None:
    assert not any(name.startswith("maskd_triton.kernels") for name in sys.modules)
    learner = MaskLearner(4, 2, impl="triton")
    torch.nn.init.ones_(learner.get_parameter("mask_modules.0.mask_token"))  # larger than as initialised: else a warning
    criterion = MaskedDistillLoss(4, 2, pretrained=learner, impl="triton")
    triton.testing.do_bench = lambda call, **_: 1.0
    x = torch.randn(1, 4, 3, 3)
    (learner(x).sum() + learner.dice_loss() + criterion(x.clone().requires_grad_(), x)).backward()

    from maskd_triton.kernels import tuning

    assert ("maskd_triton.kernels.autotune" in sys.modules) == (tuning.search is not None)
    print(*(key.kernel for key in tuning.read(tuning.user_file("cpu"))))


if __name__ == "__main__":
    main()
