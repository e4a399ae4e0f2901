"""Opening a model: low-rank modules, the transformers plugin, loading. Nothing is imported here."""
