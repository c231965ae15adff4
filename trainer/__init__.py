"""The trainer: one readable loop around a model, its shards and its data."""
