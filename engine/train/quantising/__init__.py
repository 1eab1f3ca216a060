"""A checkpoint of 16-bit weights -> one of 8 or 4 bits, and what that costs in perplexity."""
