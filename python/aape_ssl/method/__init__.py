"""What a paper would describe, in pure torch: model, masks, objective, diagnostics."""
