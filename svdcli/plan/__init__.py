"""Words and numbers, standard library only: recipe, layers, ranks, budgets, plan."""
