"""Using a model: text from it, and how well it predicts."""
