"""Features calls of the towers for which transformers has none; one file for each family."""
