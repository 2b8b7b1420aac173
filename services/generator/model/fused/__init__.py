"""Our own decoder for the Llama class of models: concatenated, packed weights."""
