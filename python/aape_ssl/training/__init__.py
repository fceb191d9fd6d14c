"""Pre-training and fine-tuning: modules, optimisation, sharding, monitor, and the commands that run them."""
