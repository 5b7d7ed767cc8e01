"""Megatron-style pretraining of the Aquila2 family: Megatron's layout and data format, with proofs."""

__version__ = "0.1.0"
