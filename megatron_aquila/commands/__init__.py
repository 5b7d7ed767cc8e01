"""One module a command of ``python -m megatron_aquila``: parse, call the library, print."""
