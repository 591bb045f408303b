"""The makers' measurements: run from the clone as `python -m benchmarks.NAME`; not installed with the course."""
