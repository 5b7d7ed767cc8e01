"""Benchmarks, one command each: ``python -m benchmarks.NAME``; ``python -m benchmarks.page`` makes a page of them."""
