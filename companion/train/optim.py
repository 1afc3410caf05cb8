"""SGD, Adam (Kingma & Ba, 2015) and AdamW (Loshchilov & Hutter, 2019), written out.

Each is a `torch.optim.Optimizer`, so schedulers, parameter groups and state dictionaries work as usual, and
the state has torch.optim's names: a run begun with one may be continued with the other. An update is a few
operations on lists of tensors (`torch._foreach_…`): on an accelerator one list holds all parameters, so
that the number of kernels does not grow with the model; on a CPU one list holds all small tensors, whose
calls cost more than their arithmetic, and a large tensor has its own, for Adam in pieces, to stay in
the cache from the first operation to the last.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from numbers import Real

import torch
from torch import Tensor

SMALL, PIECE = 4096, 2**17  # elements


def _pieces(*lists: list[Tensor]) -> list[tuple[list[Tensor], ...]]:
    """The lists; or, where each holds one large CPU tensor, lists of its pieces, one after the other."""
    tensors = [tensor for tensor, *_ in lists]
    large = tensors[0].device.type == "cpu" and tensors[0].numel() > PIECE
    if not large or not all(tensor.is_contiguous() for tensor in tensors):
        return [lists]
    split = (tensor.view(-1).split(PIECE) for tensor in tensors)
    return [tuple([piece] for piece in pieces) for pieces in zip(*split, strict=True)]


class _Optimizer(torch.optim.Optimizer):
    """What the three share: checked arguments, and the walk over parameters that have a gradient."""

    def add_param_group(self, param_group: dict) -> None:
        _check_options({**self.defaults, **param_group})
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update each parameter that has a gradient; `closure`, if given, computes the loss to return.

        Raises TypeError on a sparse or complex gradient, before any parameter has changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        for g in (p.grad for p in parameters):
            if g.layout is not torch.strided or not g.is_floating_point():
                raise TypeError(f"gradients must be dense and real, got {g.layout} of {g.dtype}")
        for group in self.param_groups:
            for params in self._buckets(group["params"]):
                self._update(params, [p.grad for p in params], group)
        return loss

    def _buckets(self, params: list[Tensor]) -> Iterator[list[Tensor]]:
        """Split the parameters that have gradients into lists that are updated together."""
        buckets = defaultdict(list)
        for p in params:
            if p.grad is None:
                continue
            if p.device.type == "cpu" and p.numel() > SMALL:
                yield [p]
            else:  # the number of updates differs where a parameter has not had a gradient at every step
                state = self.state.get(p, {})
                buckets[p.device, p.dtype, len(state), int(state.get("step", 0))].append(p)
        yield from buckets.values()

    def _update(self, params: list[Tensor], grads: list[Tensor], group: dict) -> None:
        """Change `params`, which share device, dtype and number of past updates, by one step."""
        raise TypeError(f"{type(self).__name__} has no update: use SGD, Adam or AdamW")


class SGD(_Optimizer):
    """Stochastic gradient descent: θ ← θ − lr · g.

    With momentum μ the step is along the velocity b ← μ·b + g (Polyak, 1964; the first b is g), and with
    Nesterov's form along g + μ·b (Sutskever et al., 2013). Weight decay λ adds λ·θ to g. As torch.optim.SGD
    without dampening. State: none, or one tensor a parameter (`momentum_buffer`).

    Raises ValueError if a number is negative or not finite, or nesterov comes without momentum.
    """

    def __init__(self, params, lr: float, momentum=0.0, weight_decay=0.0, nesterov=False):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "nesterov": nesterov}
        super().__init__(params, defaults)

    def _update(self, params, grads, group):
        momentum, decay = group["momentum"], group["weight_decay"]
        if decay:
            grads = torch._foreach_add(grads, params, alpha=decay)
        if momentum:
            if self.state[params[0]].get("momentum_buffer") is None:
                velocities = [g.clone() for g in grads]
                for p, velocity in zip(params, velocities, strict=True):
                    self.state[p]["momentum_buffer"] = velocity
            else:
                velocities = [self.state[p]["momentum_buffer"] for p in params]
                torch._foreach_mul_(velocities, momentum)
                torch._foreach_add_(velocities, grads)
            grads = torch._foreach_add(grads, velocities, alpha=momentum) if group["nesterov"] else velocities
        torch._foreach_add_(params, grads, alpha=-group["lr"])


class Adam(_Optimizer):
    """Adam: the gradient's running mean over the root of its running mean square.

    At update t = 1, 2, …:

        m ← β₁·m + (1 − β₁)·g           m̂ = m / (1 − β₁ᵗ)
        v ← β₂·v + (1 − β₂)·g²          v̂ = v / (1 − β₂ᵗ)
        θ ← θ − lr · m̂ / (√v̂ + ε)

    m and v begin at 0; the division by 1 − βᵗ removes that bias. Weight decay λ adds λ·θ to g, so it is
    rescaled like the gradient (AdamW does not). The Transformer of 2017 used betas (0.9, 0.98), eps 1e-9.

    Args:
        lr: learning rate.
        betas: (β₁, β₂), each in [0, 1).
        eps: ε, outside the root.
        weight_decay: λ, the weight of an L2 penalty λ/2·‖θ‖².

    State: two tensors a parameter (`exp_avg`, `exp_avg_sq`) and `step`. As torch.optim.Adam.
    Raises ValueError if a number is negative or not finite, or a beta lies outside [0, 1).
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def _update(self, params, grads, group):
        grads = self._decay(params, grads, group)
        states = [self._state_of(p) for p in params]
        for state in states:
            state["step"] = state["step"] + 1
        step, (beta1, beta2) = int(states[0]["step"]), group["betas"]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]

        for p, g, mean, square in _pieces(params, grads, means, squares):
            torch._foreach_lerp_(mean, g, 1 - beta1)
            torch._foreach_mul_(square, beta2)
            torch._foreach_addcmul_(square, g, g, 1 - beta2)
            denominators = torch._foreach_sqrt(square)
            torch._foreach_div_(denominators, math.sqrt(1 - beta2**step))
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(p, mean, denominators, -group["lr"] / (1 - beta1**step))

    def _decay(self, params, grads, group):
        """The gradients with the penalty's λ·θ added."""
        decay = group["weight_decay"]
        return torch._foreach_add(grads, params, alpha=decay) if decay else grads

    def _state_of(self, p: Tensor) -> dict:
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


class AdamW(Adam):
    """Adam with decoupled weight decay: θ ← θ − lr·λ·θ beside Adam's step, not through its m and v.

    Arguments, state and errors as for `Adam`; the default λ is 0.01, as in torch.optim.AdamW.
    """

    def __init__(self, params, lr: float = 1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        super().__init__(params, lr, betas, eps, weight_decay)

    def _decay(self, params, grads, group):
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        return grads


def _check_options(options: dict) -> None:
    for name in ("lr", "eps", "momentum", "weight_decay"):
        value = options.get(name, 0.0)
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, got {value}")
    betas = options.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    if options.get("nesterov") and not options["momentum"]:
        raise ValueError("nesterov needs momentum above 0, got momentum 0")
