"""Layer normalisation (Ba, Kiros & Hinton, 2016)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import check_features, check_number, check_positive


class LayerNorm(nn.Module):
    """Bring each vector to mean 0 and variance 1 over its features, then apply a learned gain and bias.

    y = (x − mean(x)) / sqrt(var(x) + eps) · gain + bias, mean and (biased) variance over the last
    dimension of each token alone: no other token, and no other sequence, has a part in it.
    The arithmetic is PyTorch's fused kernel; `torch.nn.LayerNorm` calls gain `weight`.

    Args:
        d_model: size of the last dimension.
        eps: added to the variance inside the root.

    Shape: (..., d_model) → (..., d_model).
    """

    def __init__(self, d_model: int, eps: float = 1e-5):
        super().__init__()
        check_positive("d_model", d_model)
        check_number("eps", eps)
        if not eps > 0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.gain = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.gain.shape[0])
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)
