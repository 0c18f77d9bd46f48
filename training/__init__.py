"""Training of quill, the small language model that ships with Quire."""
