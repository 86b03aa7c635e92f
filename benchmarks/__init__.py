"""The price: what each op costs, and how far that is from its floor."""
