"""Do the filters help? Labelled tasks made from real sound, encoders trained alike, and intervals: `make ssl`."""
