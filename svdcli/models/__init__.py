"""What needs a live nn.Module: low-rank modules, the transformers plugin, loading, evaluation. Nothing is imported here."""
