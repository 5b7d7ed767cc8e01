"""Arithmetic of a run: grids, shapes, stages, batches, FLOPs, memory, time. Pure Python; imports no torch."""
