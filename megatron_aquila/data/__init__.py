"""Tokens: indexed datasets, GPT samples, blends, loading, tokenizing. numpy only; imports no torch."""
