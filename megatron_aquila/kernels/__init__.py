"""The math of single operations: a plain reference first, fast versions beside it, chosen in ``dispatch``."""
