"""From sound files to batches of log-mels: decoding, front ends, sources, the resumable loader."""
