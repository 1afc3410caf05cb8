"""Weights and checkpoints on disk: safetensors and JSON, written whole or not at all, nothing pickled.

A checkpoint folder holds one subfolder for each saved step and a pointer to the last complete one:

    latest                     JSON: the subfolder's name and the sha256 of its state.json
    step-00001000/
        model.safetensors      the model's parameters and buffers
        optimizer.safetensors  the tensors of the optimizer's state, "<parameter>.<name>"
        random.safetensors     the states of the random generators, "<process>.<generator>"
        state.json             step, optimizer settings, history, sha256 of the three files above

A subfolder is written under a temporary name, brought to the disk, renamed, and only then pointed at, so a
process killed at any moment leaves the previous checkpoint, or the new one, complete.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from companion._checks import check_positive
from companion._io import atomic_write

FORMAT = 1
_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")


def save_weights(
    model: nn.Module, path, *, dtype: torch.dtype | None = None, metadata: Mapping[str, str] | None = None
) -> None:
    """Write the model's parameters and buffers to `path` as safetensors, in one atomic step.

    Tied tensors are stored once. `dtype` (say torch.float16) converts the floating-point ones for shipping;
    `metadata` is a small table of strings kept in the file's header.

    Raises TypeError if dtype is not a floating-point dtype or metadata not strings, and ValueError if a
    finite weight would overflow in `dtype`; the file at `path` is then as before.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype must be a floating-point torch.dtype, got {dtype!r}")
    metadata = dict(metadata or {})
    if not all(isinstance(text, str) for item in metadata.items() for text in item):
        raise TypeError(f"metadata must map strings to strings, got {metadata!r}")
    tensors = {name: _converted(name, t, dtype) for name, t in _tensors(model).items()}
    atomic_write(path, _serialised(tensors, metadata))


def load_weights(model: nn.Module, path) -> dict[str, str]:
    """Copy the weights in `path` into the model, and return the metadata saved with them.

    Everything is read and compared with the model first: names and shapes must match, and dtypes too, except
    that any floating-point dtype may go into any other. Devices do not matter.

    Raises ValueError, with the model untouched, if the file is damaged or does not fit the model, and
    FileNotFoundError if there is none.
    """
    tensors, metadata = _read_safetensors(Path(path))
    _check_fit(model, tensors, path)
    _copy(model, tensors)
    return metadata


@dataclass
class Checkpoint:
    """A training run at rest: everything that the next step depends on.

    Attributes:
        step: updates done.
        model: parameters and buffers by name.
        optimizer_tensors: the optimizer's state, "<parameter index>.<name>".
        random: the random generators, "<process>.<generator>" (see `random_state`).
        state: what is not a tensor, as JSON holds it: "optimizer" (class, groups, numbers) and the caller's
            entries (the training loop's settings and history).
    """

    step: int
    model: dict[str, Tensor]
    optimizer_tensors: dict[str, Tensor]
    random: dict[str, Tensor]
    state: dict = field(default_factory=dict)


def save_checkpoint(
    folder,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    step: int,
    random: Mapping[str, Tensor],
    state: Mapping | None = None,
    keep: int | None = 2,
) -> Path:
    """Write a checkpoint into `folder` (made if missing) and point `latest` at it; return its subfolder.

    The `keep` newest subfolders stay (None: all), older ones are removed once the pointer has moved.
    One process at a time may write into a folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors, optimizer_state = _split_optimizer(optimizer)
    files = dict(zip(_FILES, (_tensors(model), tensors, dict(random)), strict=True))

    _remove_debris(folder)
    target = folder / f"step-{step:08d}"
    if target.exists() and _pointer(folder)[0] == target.name:
        raise ValueError(f"step {step} is already the last checkpoint in {folder}")
    temporary = folder / f".{target.name}"
    temporary.mkdir()
    digests = {}
    for name, content in files.items():
        data = _serialised({key: _converted(key, t, None) for key, t in content.items()})
        digests[name] = hashlib.sha256(data).hexdigest()
        atomic_write(temporary / name, data)
    entries = {"format": FORMAT, "step": step, "files": digests, "optimizer": optimizer_state}
    text = json.dumps({**entries, **(state or {})}).encode()
    atomic_write(temporary / "state.json", text)

    if target.exists():  # whole, but never pointed at: the process ended between the two steps below
        shutil.rmtree(target)
    os.replace(temporary, target)
    pointer = {"checkpoint": target.name, "sha256": hashlib.sha256(text).hexdigest()}
    atomic_write(folder / "latest", json.dumps(pointer).encode())
    if keep is not None:
        steps = sorted(path for path in folder.glob("step-*") if path.name <= target.name)
        for old in steps[:-keep]:
            shutil.rmtree(old)
    return target


def read_checkpoint(folder) -> Checkpoint | None:
    """The last complete checkpoint in `folder`, read and verified against its sha256; None if there is none.

    Raises ValueError that names the file if anything is missing or damaged.
    """
    folder = Path(folder)
    if not (folder / "latest").exists():
        return None
    name, digest = _pointer(folder)
    state, contents = _read_subfolder(folder / name, digest)
    return Checkpoint(state.pop("step"), *contents, state)


def restore(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put model and optimizer where the checkpoint left them.

    Raises ValueError, with both untouched, if it was made by another model or optimizer.
    """
    _check_fit(model, checkpoint.model, "the checkpoint", same_dtype=True)
    optimizer_state = _join_optimizer(optimizer, checkpoint)
    _copy(model, checkpoint.model)
    optimizer.load_state_dict(optimizer_state)


def average_checkpoints(model: nn.Module, folder, last: int) -> list[int]:
    """Load into the model the mean of the `last` newest checkpoints in `folder`; return their steps.

    Averaging the weights of neighbouring checkpoints evens out the noise of the last updates; Vaswani et al.
    (2017, §6.1) average 5 for their base model.

    Raises ValueError, with the model untouched, if there are fewer, or one is damaged or does not fit.
    """
    check_positive("last", last)
    newest = sorted(Path(folder).glob("step-*"))[-last:]
    if len(newest) < last:
        raise ValueError(f"{folder} must hold at least {last} checkpoints, got {len(newest)}")
    mean: dict[str, Tensor] = {}
    for path in newest:
        _, (tensors, *_) = _read_subfolder(path)
        _check_fit(model, tensors, path, same_dtype=True)
        for name, tensor in tensors.items():
            if not tensor.is_floating_point():
                mean[name] = tensor  # a counter: the newest
            else:
                mean[name] = mean.get(name, 0.0) + tensor.double() / last
    _copy(model, mean)
    return [int(path.name.removeprefix("step-")) for path in newest]


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The generators of torch (and of `device`, if CUDA), numpy and Python, as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, gauss_next = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": torch.tensor([*keys.tolist(), position], dtype=torch.int64),
        "numpy_gauss": torch.tensor([has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([gauss_next is not None, gauss_next or 0.0], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def set_random_state(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Undo what was drawn since `random_state`."""
    *keys, position = states["numpy"].tolist()
    has_gauss, gauss = states["numpy_gauss"].tolist()
    version, *words = states["python"].tolist()
    has_next, gauss_next = states["python_gauss"].tolist()
    torch.set_rng_state(states["torch"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), position, int(has_gauss), gauss))
    random.setstate((version, tuple(words), gauss_next if has_next else None))
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's state by name, each tensor once: of tied ones the first name stands for all."""
    model = getattr(model, "_orig_mod", model)  # what torch.compile wraps
    names: dict[int, str] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise TypeError(f"the model's state must be tensors, got {type(value).__name__} at {name!r}")
        names.setdefault(id(value), name)
    state = model.state_dict()
    return {name: state[name] for name in names.values()}


def _converted(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A contiguous copy on the CPU, floating-point ones in `dtype`."""
    tensor = tensor.detach().cpu().contiguous()
    if dtype is None or not tensor.is_floating_point():
        return tensor
    converted = tensor.to(dtype)
    if not torch.equal(converted.isfinite(), tensor.isfinite()):
        raise ValueError(f"{name} overflows in {dtype}: its largest magnitude is {tensor.abs().max():g}")
    return converted


def _serialised(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
    """The bytes of a safetensors file: the header's length (8 bytes), the header (JSON), the tensors.

    The library orders the metadata at random; here it is sorted, so that equal weights give equal bytes.
    """
    data = safetensors.torch.save(tensors)
    if not metadata:
        return data
    length = int.from_bytes(data[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(data[8 : 8 + length])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a file; the library checks the header's lengths before it allocates."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise
    except Exception as error:  # the library has several kinds for a damaged file
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _check_fit(model: nn.Module, tensors: Mapping[str, Tensor], source, *, same_dtype: bool = False) -> None:
    """Refuse tensors whose names, shapes or kinds are not the model's."""
    own = _tensors(model)
    for label, names in (("lacks", own.keys() - tensors.keys()), ("adds", tensors.keys() - own.keys())):
        if names:
            listed = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise ValueError(f"{source} does not fit the model: it {label} {listed}")
    for name, target in own.items():
        tensor = tensors[name]
        if tensor.shape != target.shape:
            raise ValueError(
                f"{source} does not fit the model: {name} has shape {tuple(tensor.shape)}, "
                f"the model's has {tuple(target.shape)}"
            )
        floating = tensor.is_floating_point() and target.is_floating_point() and not same_dtype
        if tensor.dtype != target.dtype and not floating:
            raise ValueError(
                f"{source} does not fit the model: {name} has dtype {tensor.dtype}, "
                f"the model's has {target.dtype}"
            )


@torch.no_grad()
def _copy(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, target in _tensors(model).items():
        target.copy_(tensors[name])


def _class_of(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _split_optimizer(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict]:
    """The state of an optimizer as tensors and as a JSON object."""
    state_dict = optimizer.state_dict()
    tensors, numbers = {}, {}
    for index, entries in state_dict["state"].items():
        for name, value in entries.items():
            (tensors if isinstance(value, Tensor) else numbers)[f"{index}.{name}"] = value
    return tensors, {
        "class": _class_of(optimizer),
        "groups": state_dict["param_groups"],
        "numbers": numbers,
    }


def _join_optimizer(optimizer: torch.optim.Optimizer, checkpoint: Checkpoint) -> dict:
    """The state dictionary for `optimizer` that `_split_optimizer` took apart."""
    saved = checkpoint.state["optimizer"]
    if saved["class"] != _class_of(optimizer):
        raise ValueError(f"the checkpoint's optimizer is {saved['class']}, got {_class_of(optimizer)}")
    own = optimizer.state_dict()["param_groups"]
    sizes = [[len(group["params"]) for group in groups] for groups in (saved["groups"], own)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"the checkpoint's optimizer has {sizes[0]} parameters by group, got {sizes[1]}")
    groups = [
        {key: tuple(value) if isinstance(mine.get(key), tuple) else value for key, value in group.items()}
        for group, mine in zip(saved["groups"], own, strict=True)
    ]
    state: dict[int, dict] = {}
    for key, value in {**checkpoint.optimizer_tensors, **saved["numbers"]}.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def _read_subfolder(path: Path, digest: str | None = None) -> tuple[dict, list[dict[str, Tensor]]]:
    """state.json, which must have the sha256 `digest` if one is given, and the three files it vouches for."""
    try:
        text = (path / "state.json").read_bytes()
        _check_digest(path / "state.json", text, digest)
        state = _parsed(path / "state.json", text)
        if state.pop("format") != FORMAT:
            raise ValueError(f"{path} has another format than {FORMAT}")
        digests, contents = state.pop("files"), []
        for name in _FILES:
            data = (path / name).read_bytes()
            _check_digest(path / name, data, digests[name])
            contents.append(safetensors.torch.load(data))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is not a whole checkpoint: {error.filename} is missing") from error
    return state, contents


def _parsed(path: Path, text: bytes) -> dict:
    try:
        state = json.loads(text)
        if {"format", "step", "files", "optimizer"} <= state.keys() and set(_FILES) <= state["files"].keys():
            return state
    except (ValueError, AttributeError):
        pass
    raise ValueError(f"{path} is damaged: it is not the JSON of a checkpoint")


def _remove_debris(folder: Path) -> None:
    """Remove what a process killed while it wrote has left."""
    for path in folder.glob(".step-*"):
        shutil.rmtree(path)
    for path in folder.glob(".latest.*"):
        path.unlink()


def _pointer(folder: Path) -> tuple[str, str]:
    """The subfolder that `latest` names, and the sha256 of its state.json; ("", "") without a pointer."""
    path = folder / "latest"
    if not path.exists():
        return "", ""
    try:
        pointer = json.loads(path.read_bytes())
        name, digest = pointer["checkpoint"], pointer["sha256"]
        valid = name.startswith("step-") and name[5:].isdigit()
    except (ValueError, KeyError, TypeError, AttributeError):
        valid = False
    if not valid:
        raise ValueError(f"{path} is damaged: it names no checkpoint")
    return name, digest


def _check_digest(path: Path, data: bytes, expected: str | None) -> None:
    if expected is not None and hashlib.sha256(data).hexdigest() != expected:
        raise ValueError(f"{path} is damaged: its sha256 is not the one recorded when it was written")
