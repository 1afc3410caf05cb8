"""The position-wise feed-forward network and its activations (Vaswani et al., 2017, §3.3).

ReLU is the activation of the 2017 paper; GELU (Hendrycks & Gimpel, 2016) that of BERT and GPT-2.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import check_choice, check_features, check_floating, check_positive, check_probability


def relu(x: Tensor) -> Tensor:
    """max(0, x), elementwise, with derivative 0 at 0."""
    check_floating("x", x)
    return torch.where(x <= 0, 0.0, x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x · Φ(x), where Φ is the distribution function of the standard normal.

    Args:
        approximate: "none" for the exact form (BERT), "tanh" for
            x/2 · (1 + tanh(√(2/π) (x + 0.044715 x³))) (GPT-2).
    """
    check_floating("x", x)
    check_choice("approximate", approximate, ("none", "tanh"))
    if approximate == "none":
        return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


# What FeedForward runs: PyTorch's kernels for the formulas above, one pass over memory instead of several.
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """FFN(x) = activation(x W_1 + b_1) W_2 + b_2, the same for every position; the second layer is linear.

    Args:
        d_model: size of the input and output vectors.
        d_ff: size of the hidden layer, 4 · d_model in the paper.
        activation: "relu" or "gelu" (exact).
        dropout: probability of zeroing a hidden unit in training. The paper has none here;
            `torch.nn.TransformerEncoderLayer` does.

    Shape: (..., d_model) → (..., d_model).
    """

    def __init__(self, d_model: int, d_ff: int, activation: str = "relu", dropout: float = 0.0):
        super().__init__()
        check_positive("d_model", d_model)
        check_positive("d_ff", d_ff)
        check_choice("activation", activation, ACTIVATIONS)
        check_probability("dropout", dropout)
        self.d_model, self.activation = d_model, activation
        self.up = nn.Linear(d_model, d_ff)
        self.down = nn.Linear(d_ff, d_model)
        self.dropout = nn.Dropout(dropout)
        for linear in (self.up, self.down):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.d_model)
        return self.down(self.dropout(ACTIVATIONS[self.activation](self.up(x))))
