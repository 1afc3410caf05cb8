"""The learning-rate schedule of the first Transformer (Vaswani et al., 2017, section 5.3)."""

import math

from companion._checks import check_positive


def noam(step: int, d_model: int, warmup: int, factor: float = 1.0) -> float:
    """The learning rate of an update: a linear rise over `warmup` steps, then a fall as 1/√step.

    lr = factor · d_model^(−1/2) · min(step^(−1/2), step · warmup^(−3/2)). The two branches meet at
    step = warmup, the peak: factor / √(d_model · warmup), which is 6.99e-4 for d_model 512 and warmup 4000.

    Args:
        step: number of the update, counted from 1.
        d_model: width of the model.
        warmup: number of steps of the rise.
        factor: scale of the whole curve; the paper's is 1.

    Raises ValueError if step, d_model or warmup is below 1, or factor is not positive and finite.
    """
    check_positive("step", step)
    check_positive("d_model", d_model)
    check_positive("warmup", warmup)
    if not 0.0 < factor < math.inf:
        raise ValueError(f"factor must be positive and finite, got {factor}")
    return factor * d_model**-0.5 * min(step**-0.5, step * warmup**-1.5)
