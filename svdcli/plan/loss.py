"""From the loss that layers predict one by one to the loss that a model shows."""

from __future__ import annotations

# Measured divergence against the summed prediction of the layers, over three models and three
# budgets, as a straight line in logarithms: `python tests/benchmarks/quality.py --data FOLDER`
# prints it anew. Errors of layers add up, so that a model loses more than the sum. All nine points
# lie within 1.4 times of the line.
FACTOR, EXPONENT = 2.0, 1.03


def expected_loss(predicted: float, unit: str) -> float | None:
    """The rise of the model's own loss where its layers predict `predicted` in all: the KL
    divergence from the original, in nats a prediction. The excess loss on a text is about that
    where it is large, and up to a few times more where it is small.

    None for other units: the relation was measured for language models only.
    """
    if unit != "nats":
        return None
    return float(FACTOR * predicted**EXPONENT) if predicted > 0 else 0.0
