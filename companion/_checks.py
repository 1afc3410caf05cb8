"""Argument checks: each raises an error that names the argument, what came and what is needed."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_positive(name: str, value: int) -> None:
    """Refuse anything but an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_number(name: str, value: float) -> None:
    """Refuse anything but a real number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_probability(name: str, value: float) -> None:
    """Refuse anything outside [0, 1)."""
    check_number(name, value)
    if not 0.0 <= value < 1.0:
        raise ValueError(f"{name} must lie in [0, 1), got {value}")


def check_index(name: str, value: int, size: int) -> None:
    """Refuse anything but an integer in 0 … size − 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= value < size:
        raise ValueError(f"{name} must lie in 0 … {size - 1}, got {value}")


def check_choice(name: str, value: object, choices: Collection) -> None:
    """Refuse a value that is not one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_texts(name: str, texts: object) -> None:
    """Refuse anything but a sequence of at least one str; a str is not one."""
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise TypeError(f"{name} must be a sequence of str, got {type(texts).__name__}")
    if len(texts) == 0:
        raise ValueError(f"{name} must hold at least one text, got none")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(f"{name}[{i}] must be a str, got {type(text).__name__}")


def check_tensor(name: str, x: object) -> None:
    """Refuse anything but a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def check_floating(name: str, x: object) -> None:
    """Refuse anything but a tensor of real floating-point numbers."""
    check_tensor(name, x)
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_features(name: str, x: object, size: int, dims: int | None = None) -> None:
    """Refuse an empty tensor, or one whose last dimension is not `size` or that has not `dims` dimensions."""
    check_floating(name, x)
    if dims is not None and x.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(x.shape)}")
    if x.dim() == 0 or x.shape[-1] != size:
        raise ValueError(f"{name} must have shape (..., {size}), got {tuple(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(x.shape)}")


def check_broadcast(name: str, x: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a tensor without dimensions, or one that does not broadcast to the shape."""
    pairs = zip(reversed(x.shape), reversed(shape), strict=False)
    if not 1 <= x.dim() <= len(shape) or not all(size in (1, needed) for size, needed in pairs):
        raise ValueError(f"{name} must broadcast to {tuple(shape)}, got {tuple(x.shape)}")


def check_ids(name: str, ids: object, vocab_size: int, dims: int | None = None) -> None:
    """Refuse anything but a non-empty integer tensor with values in 0 … vocab_size − 1.

    The range is not read while torch.compile traces: it would need the data.
    """
    check_tensor(name, ids)
    if ids.dtype not in INTEGER_DTYPES:
        raise TypeError(f"{name} must be an integer tensor, got {ids.dtype}")
    if dims is not None and ids.dim() != dims:
        raise ValueError(f"{name} must have {dims} dimensions, got shape {tuple(ids.shape)}")
    if ids.numel() == 0:
        raise ValueError(f"{name} must not be empty, got shape {tuple(ids.shape)}")
    if torch.compiler.is_compiling():
        return
    low, high = torch.stack(ids.aminmax()).tolist()  # one transfer where ids are on a GPU
    if low < 0 or high >= vocab_size:
        raise ValueError(f"{name} must lie in 0 … {vocab_size - 1}, got values from {low} to {high}")
