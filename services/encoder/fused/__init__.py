"""Our own vision towers: packed weights, batched windows, fused elementwise operations."""
