"""The model: half-loaded decoder, attention over the paged KV cache, and the runner."""
