"""Tensors in, tensors out: solvers, weighted problems, layouts of factors. Imports torch and
nothing of ours."""
