"""The training loop: accumulated, clipped, recorded, resumable, and the same under `torchrun`.

One step takes `accumulate` micro-batches, sums their losses and gradients, and divides both by the number
of target tokens in all of them, so that how a batch is cut into micro-batches, or shared among processes,
changes the result by rounding only. (The mean of the micro-batches' means weighs a token in a short one
more.) Data are a function of the micro-batch's number: the position in the stream is the step itself, and
a resumed run sees exactly the batches that the interrupted one would have seen.
"""

import atexit
import contextlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from companion._checks import check_positive
from companion._io import atomic_write
from companion.train.checkpoint import (
    Checkpoint,
    random_state,
    read_checkpoint,
    restore,
    save_checkpoint,
    set_random_state,
)


@dataclass
class History:
    """What happened at each step, and the evaluations between them.

    Attributes:
        steps: 1, 2, …
        losses: mean loss a target token, in nats, over the step's whole batch.
        learning_rates: of the first parameter group.
        grad_norms: Euclidean norm of the whole gradient, before clipping.
        tokens: target tokens in the step's whole batch.
        evaluations: {"step": s, name: value, …} for each evaluation.
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    def save(self, path) -> None:
        """Write JSON lines: one object a step, and {"evaluation": {…}} after the step it followed."""
        rows = zip(self.steps, self.losses, self.learning_rates, self.grad_norms, self.tokens, strict=True)
        evaluations = {}
        for evaluation in self.evaluations:
            evaluations.setdefault(evaluation["step"], []).append({"evaluation": evaluation})
        lines = []
        for row in rows:
            lines += [dict(zip(_COLUMNS, row, strict=True)), *evaluations.get(row[0], [])]
        atomic_write(path, "".join(json.dumps(line) + "\n" for line in lines).encode())

    @classmethod
    def load(cls, path) -> "History":
        """Read what `save` wrote. Raises ValueError that names the line if one is not of that form."""
        history = cls()
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
            try:
                entry = json.loads(line)
                if "evaluation" in entry:
                    history.evaluations.append(dict(entry["evaluation"]))
                else:
                    history._append(*(entry[name] for name in _COLUMNS))
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a line of a training history") from error
        return history

    def _append(self, step: int, loss: float, lr: float, grad_norm: float, tokens: int) -> None:
        self.steps.append(step)
        self.losses.append(loss)
        self.learning_rates.append(lr)
        self.grad_norms.append(grad_norm)
        self.tokens.append(tokens)


_COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens")

LossFunction = Callable[[nn.Module, Any], tuple[Tensor, int]]
Batches = Callable[[int], Any] | Sequence[Any]


def train(
    model: nn.Module,
    loss_fn: LossFunction,
    batches: Batches,
    optimizer: torch.optim.Optimizer,
    *,
    steps: int,
    schedule: Callable[[int], float] | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    autocast: torch.dtype | None = None,
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 1000,
    keep_checkpoints: int | None = 2,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    evaluate_every: int | None = None,
    progress: bool = True,
) -> History:
    """Train the model up to step `steps`, and return the history of all steps from the first.

    Args:
        model: trained in place, on the device it is on.
        loss_fn: `loss_fn(model, batch) -> (loss_sum, count)`, the loss summed over the target tokens of a
            micro-batch, and their number. It must run the model by calling it: under `torchrun` what it gets
            is the model wrapped in DistributedDataParallel.
        batches: `batches(i)` returns micro-batch i = 0, 1, 2, … and is a function of i alone; or a sequence,
            read round and round. Tensors in it are moved to the model's device.
        optimizer: over the model's parameters; its `lr` is overwritten where there is a schedule.
        steps: number of updates in all, those of an interrupted run included.
        schedule: step, counted from 1 → learning rate.
        accumulate: micro-batches a step, over all processes together. Step s takes the numbers
            (s − 1)·accumulate … s·accumulate − 1; of P processes, process r takes every P-th from the r-th.
        clip_norm: the gradient is scaled down to this Euclidean norm where it is longer.
        autocast: torch.bfloat16 runs the forward pass in mixed precision; None in the weights' precision.
        checkpoint: folder to write checkpoints to and, where it holds one, to resume from.
        checkpoint_every: steps between checkpoints; the last step always leaves one.
        keep_checkpoints: how many of the newest to keep; None keeps all.
        evaluate: `evaluate(model) -> number or {name: number}`, called with the bare model in evaluation mode
            and without gradients, in every process; what process 0 returns is recorded.
        evaluate_every: steps between evaluations; one always follows the last step.
        progress: show a progress bar with the loss.

    A run killed at any moment and started again with the same arguments ends with the same weights, to the
    bit, as one never interrupted: weights, optimizer, history and the random generators of torch, numpy and
    Python come from the checkpoint, and the batches from the step.

    Under `torchrun` (or in a process group that exists already) each process computes its share and process
    0 alone writes and shows progress; the backend is nccl where the model is on a GPU (put it on
    `local_device()`), else gloo. Every process seeds itself: dropout is as random as those seeds.

    Raises:
        TypeError, ValueError: an argument is of the wrong kind or value, or the checkpoint is damaged or was
            made by another model, optimizer or setting. Nothing has changed then.
        FloatingPointError: the loss or the gradient of a step is not finite; the weights are those before it.
    """
    _check_model(model, optimizer)
    _check_functions(loss_fn=loss_fn, schedule=schedule, evaluate=evaluate)
    _check_counts(
        steps=steps,
        accumulate=accumulate,
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        evaluate_every=evaluate_every,
    )
    if clip_norm is not None and not 0.0 < clip_norm < math.inf:
        raise ValueError(f"clip_norm must be positive and finite, got {clip_norm}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"autocast must be None or torch.bfloat16, got {autocast}")
    batch_at = _indexed(batches)
    device = next(model.parameters()).device
    rank, processes = _process_group(device, accumulate)
    settings = {"accumulate": accumulate, "processes": processes}

    history, first = History(), 1
    saved = read_checkpoint(checkpoint) if checkpoint is not None else None
    if saved is not None:
        _check_settings(saved, settings, steps)
        restore(saved, model, optimizer)
        history, first = History(**saved.state["history"]), saved.step + 1
        set_random_state(_of_process(saved.random, rank), device)

    was_training = model.training
    model.train()
    parallel = _parallel(model, device) if processes > 1 else model
    bar = tqdm(total=steps, initial=first - 1, unit="step", disable=not progress or rank > 0)
    with bar:
        for step in range(first, steps + 1):
            lr = _set_learning_rate(optimizer, schedule, step)
            numbers = range((step - 1) * accumulate + rank, step * accumulate, processes)
            optimizer.zero_grad(set_to_none=True)
            loss, tokens = _accumulate(parallel, loss_fn, batch_at, numbers, device, autocast)
            norm = _normalise(model, tokens, processes, clip_norm)
            if not (math.isfinite(loss) and math.isfinite(norm)):
                optimizer.zero_grad(set_to_none=True)
                raise FloatingPointError(f"step {step}: the loss is {loss}, the gradient's norm {norm}")
            optimizer.step()
            history._append(step, loss, lr, norm, tokens)

            if evaluate is not None and (step == steps or evaluate_every and step % evaluate_every == 0):
                history.evaluations.append({"step": step, **_evaluated(model, evaluate)})
            if checkpoint is not None and (step == steps or step % checkpoint_every == 0):
                generators = _gathered(random_state(device), rank, processes, device)
                if rank == 0:
                    state = {**settings, "history": asdict(history)}
                    here = {"step": step, "random": generators, "state": state}
                    save_checkpoint(checkpoint, model, optimizer, **here, keep=keep_checkpoints)
            bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
            bar.update()
    optimizer.zero_grad(set_to_none=True)
    model.train(was_training)
    return history


def local_device() -> torch.device:
    """This process's own GPU (under `torchrun`, number LOCAL_RANK), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _accumulate(model, loss_fn, batch_at, numbers, device, autocast) -> tuple[float, int]:
    """Add up the gradients of the summed loss; return the mean loss and the token count of all processes."""
    sums, count = [], 0
    for number in numbers:
        batch = _to(batch_at(number), device)
        last = number == numbers[-1]
        hold = model.no_sync() if isinstance(model, DistributedDataParallel) and not last else None
        with hold or contextlib.nullcontext():  # processes exchange gradients once a step
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss_sum, micro_count = _checked_loss(loss_fn(model, batch))
            loss_sum.backward()
        sums.append(loss_sum.detach())
        count += micro_count
    total = torch.tensor([math.fsum(map(float, sums)), count], dtype=torch.float64)
    if isinstance(model, DistributedDataParallel):
        total = total.to(device)
        dist.all_reduce(total)
    loss_sum, count = total.tolist()
    if count < 1:
        raise ValueError("a step has no target token: the counts that loss_fn returned add up to 0")
    return loss_sum / count, int(count)


def _normalise(model: nn.Module, tokens: int, processes: int, clip_norm: float | None) -> float:
    """Turn the gradient of the summed loss into that of the mean, and clip it; return its norm before."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    torch._foreach_mul_([p.grad for p in parameters], processes / tokens)  # DDP has divided by their number
    return float(nn.utils.clip_grad_norm_(parameters, math.inf if clip_norm is None else clip_norm))


def _set_learning_rate(optimizer, schedule, step: int) -> float:
    if schedule is not None:
        for group in optimizer.param_groups:
            group["lr"] = schedule(step)
    return float(optimizer.param_groups[0]["lr"])


def _evaluated(model: nn.Module, evaluate) -> dict[str, float]:
    model.eval()
    with torch.no_grad():
        result = evaluate(model)
    model.train()
    named = result if isinstance(result, Mapping) else {"value": result}
    return {name: float(value) for name, value in named.items()}


def _indexed(batches: Batches) -> Callable[[int], Any]:
    if callable(batches):
        return batches
    if not hasattr(batches, "__getitem__") or not hasattr(batches, "__len__"):
        raise TypeError(f"batches must be a function of an index or a sequence, got {type(batches).__name__}")
    if len(batches) == 0:
        raise ValueError("batches must not be empty")
    return lambda index: batches[index % len(batches)]


def _to(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors, in whatever nest of tuples, lists and dictionaries, on the device."""
    if isinstance(batch, Mapping):
        return {key: _to(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(_to(value, device) for value in batch)
    return batch.to(device, non_blocking=True) if hasattr(batch, "to") else batch


def _checked_loss(result) -> tuple[Tensor, int]:
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"loss_fn must return (loss_sum, count), got {type(result).__name__}")
    loss_sum, count = result[0], int(result[1])
    if not isinstance(loss_sum, Tensor) or loss_sum.dim() > 0 or not loss_sum.requires_grad:
        raise TypeError("loss_fn must return as loss_sum a scalar tensor that depends on the parameters")
    if count < 0:
        raise ValueError(f"loss_fn must return a count of at least 0, got {count}")
    return loss_sum, count


def _process_group(device: torch.device, accumulate: int) -> tuple[int, int]:
    """(rank, number of processes), joining the group that `torchrun` announces in the environment."""
    if not dist.is_available():
        return 0, 1
    announced = int(os.environ.get("WORLD_SIZE", 1))
    processes = dist.get_world_size() if dist.is_initialized() else announced
    if accumulate % processes:
        raise ValueError(
            f"accumulate, the micro-batches of a step over all processes, must be a multiple of "
            f"their number, {processes}, got {accumulate}"
        )
    if processes > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    return (dist.get_rank() if processes > 1 else 0), processes


def _parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _gathered(states: dict[str, Tensor], rank: int, processes: int, device) -> dict[str, Tensor]:
    """The random states of all processes, "<process>.<generator>"."""
    if processes == 1:
        return {f"0.{name}": state for name, state in states.items()}
    everyone = {}
    for name, state in states.items():
        copies = [torch.empty_like(state, device=device) for _ in range(processes)]
        dist.all_gather(copies, state.to(device))
        everyone |= {f"{process}.{name}": copy.cpu() for process, copy in enumerate(copies)}
    return everyone


def _of_process(states: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    prefix = f"{rank}."
    return {name.removeprefix(prefix): state for name, state in states.items() if name.startswith(prefix)}


def _check_settings(saved: Checkpoint, settings: dict[str, int], steps: int) -> None:
    for name, value in settings.items():
        if saved.state[name] != value:
            raise ValueError(f"the checkpoint was made with {name} = {saved.state[name]}, got {value}")
    if saved.step > steps:
        raise ValueError(f"steps must be at least {saved.step}, where the checkpoint stands, got {steps}")


def _check_model(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    own = {id(p) for p in model.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer must hold parameters of the model only, got others")


def _check_functions(**functions) -> None:
    for name, function in functions.items():
        if not callable(function) and (function is not None or name == "loss_fn"):
            raise TypeError(f"{name} must be callable, got {type(function).__name__}")


def _check_counts(**counts) -> None:
    for name, value in counts.items():
        if value is not None or name not in ("keep_checkpoints", "evaluate_every"):
            check_positive(name, value)
