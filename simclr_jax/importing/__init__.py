"""Weights of others: the official checkpoints of SimCLR v1 and v2 into ours."""
