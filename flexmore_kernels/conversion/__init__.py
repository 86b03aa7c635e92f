"""From full-size experts to low-rank ones: singular values, rank rules, budgets, activations."""
