"""What ``test_install.py`` runs: ``impl="triton"`` for tensors that no kernel can reach; prints the error."""

import torch

from maskd_triton import MaskedDistillLoss, MaskLearner


def main() -> None:
    x, learner = torch.ones(1, 4, 3, 3), MaskLearner(4)
    torch.nn.init.ones_(learner.mask_modules[0].mask_token)  # in place of stage 1
    try:
        MaskedDistillLoss(4, pretrained=learner, impl="triton")(x.clone().requires_grad_(), x)
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main()
