"""What is written and read again: checkpoints of training, exported encoders."""
