"""What a stem costs: `pytest benchmarks` measures, `python -m benchmarks.table` prints the table. See README.md."""
