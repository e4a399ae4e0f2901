"""What the layers of a model see, and how much it matters to the model's loss."""
