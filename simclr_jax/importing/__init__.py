"""Weights from elsewhere: converts the official checkpoints of SimCLR v1 and v2."""
