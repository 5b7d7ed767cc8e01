"""The run: environment, building, one step, the loop."""
