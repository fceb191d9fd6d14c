"""A slim self-supervised trainer for audio transformers with the AaPE stem: `aape-ssl demo`, `aape-ssl pretrain`."""
