"""Refining the factors of a compressed model against its original."""
