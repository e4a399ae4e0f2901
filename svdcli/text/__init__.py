"""From a path to documents, tokens and windows."""
