"""The same checkpoint in transformers and in Quire. Skipped where torch is not installed."""
