"""From the loss that layers predict one by one to the loss that a model shows."""

from __future__ import annotations

# Measured excess loss against the summed prediction of the layers, over three models and three budgets, as a straight line in
# logarithms: `python tests/benchmarks/quality.py --data FOLDER` prints it anew. Errors of layers add up, so that a model
# loses more than the sum. Single points are off by up to 4 times where the loss is below 0.005 nats, by 1.4 times above.
FACTOR, EXPONENT = 1.6, 0.9


def expected_loss(predicted: float, unit: str) -> float | None:
    """The rise of the model's loss to be expected where its layers predict `predicted` in all, in nats a prediction.

    None for other units: the relation was measured for language models only.
    """
    if unit != "nats":
        return None
    return FACTOR * predicted**EXPONENT if predicted > 0 else 0.0
