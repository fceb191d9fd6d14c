"""A slim self-supervised trainer for audio transformers with the AaPE stem; for now its front end and the demo."""
