"""Matrices that stay quantised in memory and are decoded inside the product.

A decoded matrix would take the memory that quantising it saved. So y = x Wᵀ is computed for some hundred rows
of W at once: they are decoded into a piece that fits the processor's cache, multiplied, and forgotten. For
the one or few rows of x that choosing a token has, decoding is most of it; `companion.quantize.kernels`
does it in the processor's registers, where numba is installed. What stays in memory is one of

    "int8"         one signed byte a weight, one float32 a row: w = scale · q (`companion.quantize.uniform`)
    a GGUF type    the blocks of a GGUF file as they lie there (`companion.quantize.blocks`)

The activations stay floating: this is weight-only quantisation, W8A16 and the like in the field's shorthand.
PyTorch has the first product as `torch._weight_int8pack_mm`; llama.cpp's kernels for the second quantise the
activations as well.
"""

import functools
import math
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from companion._checks import check_choice, check_features, check_floating, check_ids, check_tensor
from companion.quantize import blocks, uniform

_PIECE = 1 << 18  # weights decoded at a time: a megabyte in float32
_FEW = 8  # rows of x up to which decoding for each of them anew is the quicker way
_QUANTISED_AT_ONCE = 1 << 21  # weights, so that a large matrix needs little memory beside itself


class QuantizedMatrix(nn.Module):
    """A matrix W of shape (rows, columns), stored as integers with their scales.

    Args:
        weight: int8 (rows, columns) for type "int8", uint8 (rows, bytes of a row) for a GGUF type. It is
            kept, not copied, as a buffer: it moves with the module and gets no gradient.
        type: "int8" or a name in `companion.quantize.blocks.BLOCKS`.
        scale: floating (rows,), with "int8" only.
    """

    def __init__(self, weight: Tensor, type: str, scale: Tensor | None = None):
        super().__init__()
        check_choice("type", type, ("int8", *blocks.BLOCKS))
        check_tensor("weight", weight)
        size, num_bytes = (1, 1) if type == "int8" else blocks.BLOCKS[type]
        dtype = torch.int8 if type == "int8" else torch.uint8
        if weight.dtype != dtype:
            raise TypeError(f"weight must be {dtype} for {type}, got {weight.dtype}")
        if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % num_bytes:
            raise ValueError(
                f"weight must be a matrix of rows of whole blocks of {num_bytes} bytes for {type}, "
                f"got shape {tuple(weight.shape)}"
            )
        if (scale is None) == (type == "int8"):
            raise ValueError(f"scale must be {'given' if scale is None else 'None'} for {type}")
        if scale is not None:
            check_floating("scale", scale)
            if scale.shape != weight.shape[:1]:
                raise ValueError(f"scale must have shape {tuple(weight.shape[:1])}, got {tuple(scale.shape)}")
        self.type, self.shape = type, (weight.shape[0], weight.shape[1] // num_bytes * size)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def quantise(cls, weight: Tensor, type: str = "int8", **options) -> "QuantizedMatrix":
        """Store a floating matrix (rows, columns), each row by itself; options are the class's own."""
        check_floating("weight", weight)
        if weight.dim() != 2 or weight.numel() == 0:
            raise ValueError(f"weight must be a matrix that is not empty, got shape {tuple(weight.shape)}")
        if type == "int8":
            parts = weight.detach().split(max(1, _QUANTISED_AT_ONCE // weight.shape[1]))
            parts = [uniform.quantise(part, 8, axis=0) for part in parts]
            scale = torch.cat([part.scale for part in parts]).float()
            return cls(torch.cat([part.values for part in parts]), type, scale=scale, **options)
        return cls(torch.from_numpy(blocks.quantise(weight, type)).to(weight.device), type, **options)

    def rows(self, index: slice | Tensor = slice(None), dtype: torch.dtype = torch.float32) -> Tensor:
        """The decoded rows that a slice, or a vector of row numbers, selects: (n, columns)."""
        stored = self.weight[index]
        if self.scale is not None:
            return stored.to(dtype) * self.scale[index].to(dtype).unsqueeze(1)
        raw = stored.cpu().numpy().reshape(-1)
        return blocks.dequantise(raw, self.type, (len(stored), self.shape[1])).to(stored.device, dtype)

    def multiply(self, x: Tensor) -> Tensor:
        """x Wᵀ in the dtype of x: (..., columns) → (..., rows).

        A gradient flows to x; the decoded pieces are then kept until the backward pass.
        """
        check_features("x", x, self.shape[1])
        if x.numel() <= _FEW * self.shape[1] and (kernels := self._kernels(x)) is not None:
            inputs = np.ascontiguousarray(x.detach().numpy()).reshape(-1, self.shape[1])
            scale = None if self.scale is None else self.scale.numpy()
            y = kernels.multiply(self.weight.contiguous().numpy(), self.type, inputs, scale)
            return torch.from_numpy(y.reshape(*x.shape[:-1], -1))
        pieces, step = [], max(1, _PIECE // self.shape[1])
        for start in range(0, self.shape[0], step):
            index = slice(start, start + step)
            if self.scale is None:
                pieces.append(F.linear(x, self.rows(index, x.dtype)))
            else:  # a row's scale is one number's, after the product
                pieces.append(F.linear(x, self.weight[index].to(x.dtype)) * self.scale[index].to(x.dtype))
        return torch.cat(pieces, -1)

    def _kernels(self, x: Tensor) -> ModuleType | None:
        """The compiled products, where they serve: float32 on a CPU, and no gradient."""
        kernels = _compiled()
        if kernels is None or self.type not in kernels.PRODUCTS or x.dtype != torch.float32:
            return None
        if not x.is_cpu or torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            return None
        return kernels

    def extra_repr(self) -> str:
        return f"{self.shape[0]}, {self.shape[1]}, {self.type}"


class QuantizedLinear(QuantizedMatrix):
    """`torch.nn.Linear` over a stored matrix: y = x Wᵀ + b.

    Args:
        weight, type, scale: as in `QuantizedMatrix`; (out_features, in_features).
        bias: floating (out_features,), a parameter that can be trained.

    Shape: (..., in_features) → (..., out_features), in the dtype of x.
    """

    def __init__(self, weight: Tensor, type: str, scale: Tensor | None = None, bias: Tensor | None = None):
        super().__init__(weight, type, scale)
        if bias is not None:
            check_features("bias", bias, self.shape[0], dims=1)
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.multiply(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class QuantizedEmbedding(QuantizedMatrix):
    """`companion.embeddings.TokenEmbedding` over a stored matrix, which also gives the tied logits.

    Args:
        weight, type, scale: as in `QuantizedMatrix`; (vocab_size, d_model).
        dtype: of the vectors that are looked up.

    Shape: ids (...) → (..., d_model).
    """

    def __init__(
        self,
        weight: Tensor,
        type: str,
        scale: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(weight, type, scale)
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        check_ids("ids", ids, self.shape[0])
        return self.lookup(ids) * math.sqrt(self.shape[1])

    def lookup(self, ids: Tensor) -> Tensor:
        """The rows themselves, not scaled: (...) → (..., d_model)."""
        return self.rows(ids.long().flatten(), self.dtype).view(*ids.shape, -1)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden · Eᵀ: (..., d_model) → (..., vocab_size), the tied output layer."""
        return self.multiply(hidden)


@functools.cache
def _compiled() -> ModuleType | None:
    """The module of compiled products; None without numba."""
    try:
        from companion.quantize import kernels
    except ModuleNotFoundError:
        return None
    return kernels
