"""The past: the logical model on disk, independent of the layout that wrote it, and its Hugging Face form."""
