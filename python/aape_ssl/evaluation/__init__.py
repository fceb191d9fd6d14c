"""Frozen encoders: embeddings, probes, and the commands `probe`, `embed` and `export`."""
