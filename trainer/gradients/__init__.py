"""From a backward pass to new weights: flat buffers, buckets, the fixed tree and how it travels, AdamW."""
