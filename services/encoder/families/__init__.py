"""Features calls of the towers for which transformers' own do not serve; one file a family."""
