"""The proof: parity of every layout with one process, and the worker pool that runs it."""
