"""Layer, root-mean-square and batch normalisation.

LayerNorm (Ba, Kiros & Hinton, 2016) and RMSNorm (Zhang & Sennrich, 2019) take their statistics over the
features of one token; BatchNorm (Ioffe & Szegedy, 2015) takes them over the batch, one feature at a time.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import check_features, check_floating, check_number, check_positive, check_tensor


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
        _check_eps(eps)
        self.gain = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.gain.shape[0])
        return F.layer_norm(x, self.gain.shape, self.gain, self.bias, self.eps)


class RMSNorm(nn.Module):
    """Scale each vector to root-mean-square 1 over its features, then apply a learned gain.

    y = x / sqrt(mean(x²) + eps) · gain. Of LayerNorm's steps it leaves out the mean and the bias: a factor
    on x still cancels, a shift does not. Half-precision inputs are computed in float32, gain included, and
    rounded once, as in `torch.nn.RMSNorm` (whose eps is by default that of the dtype); Llama and T5 in
    transformers round before they multiply by the gain. All of them call it `weight`.

    Args:
        d_model: size of the last dimension.
        eps: added to the mean square inside the root; models ship with 1e-5 or 1e-6.

    Shape: (..., d_model) → (..., d_model), in the dtype of the input.
    """

    def __init__(self, d_model: int, eps: float = 1e-6):
        super().__init__()
        check_positive("d_model", d_model)
        _check_eps(eps)
        self.gain = nn.Parameter(torch.ones(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        check_features("x", x, self.gain.shape[0])
        if x.dtype == self.gain.dtype:
            return F.rms_norm(x, self.gain.shape, self.gain, self.eps)
        # PyTorch's kernel asks for one dtype; under autocast a half input meets a float32 gain.
        dtype = torch.promote_types(x.dtype, self.gain.dtype)
        return F.rms_norm(x.to(dtype), self.gain.shape, self.gain.to(dtype), self.eps).to(x.dtype)


class BatchNorm1d(nn.Module):
    """Bring each channel to mean 0 and variance 1 over the batch, then apply a learned gain and bias.

    y = (x − mean) / sqrt(var + eps) · gain + bias for each channel. In training mean and (biased) variance
    are those of the batch, over N and L together, and the running statistics move towards them:
    running ← (1 − momentum) · running + momentum · batch, with the unbiased variance. In evaluation the
    running statistics stand in for the batch's, so that no example depends on its neighbours.
    `torch.nn.BatchNorm1d` calls gain `weight` and num_batches `num_batches_tracked`.

    Args:
        num_features: channels C.
        eps: added to the variance inside the root.
        momentum: weight of the newest batch in the running statistics, in [0, 1].

    Shape: (N, C) → (N, C), or (N, C, L) → (N, C, L); a batch of token vectors (b, n, d_model) is
    transposed first.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.1):
        super().__init__()
        check_positive("num_features", num_features)
        _check_eps(eps)
        check_number("momentum", momentum)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must lie in [0, 1], got {momentum}")
        self.gain = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches", torch.tensor(0))
        self.eps, self.momentum = eps, momentum

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalise x.

        Args:
            mask: bool (N, L) for x (N, C, L), False at padding. Padded positions count in no statistic,
                whatever they hold, come out as 0 and receive no gradient.

        Raises:
            ValueError: in training, where a channel has a single value and so no variance.
        """
        self._check(x, mask)
        if mask is None:
            return self._normalise(x)
        tokens = self._normalise(x.transpose(1, 2)[mask])  # (tokens, C)
        out = tokens.new_zeros(x.shape[0], x.shape[2], x.shape[1])
        return out.masked_scatter(mask.unsqueeze(-1), tokens).transpose(1, 2)

    def _normalise(self, x: Tensor) -> Tensor:
        if self.training and x[:, 0].numel() < 2:
            raise ValueError(
                "x must have more than one value per channel in training, padding aside, "
                f"got {x[:, 0].numel()}"
            )
        y = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.gain,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        if self.training:
            self.num_batches += 1
        return y

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        check_floating("x", x)
        channels = self.gain.shape[0]
        if x.dim() not in (2, 3) or x.shape[1] != channels:
            raise ValueError(f"x must have shape (N, {channels}) or (N, {channels}, L), got {tuple(x.shape)}")
        if x.numel() == 0:
            raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
        if mask is None:
            return
        check_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be a bool tensor, got {mask.dtype}")
        if x.dim() == 2:
            raise ValueError(f"mask must be None where x has no positions, got {tuple(mask.shape)}")
        if mask.shape != (x.shape[0], x.shape[2]):
            raise ValueError(f"mask must have shape {(x.shape[0], x.shape[2])}, got {tuple(mask.shape)}")


def _check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
