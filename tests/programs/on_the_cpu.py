"""What ``test_install.py`` runs: ``impl="triton"`` for tensors that no kernel can reach; prints the error."""

import torch

from maskd_triton import MaskedDistillLoss, MaskLearner


def main() -> None:
    x = torch.ones(1, 4, 3, 3)
    try:
        MaskedDistillLoss(4, pretrained=MaskLearner(4), impl="triton")(x.clone().requires_grad_(), x)
    except RuntimeError as error:
        print(error)


if __name__ == "__main__":
    main()
