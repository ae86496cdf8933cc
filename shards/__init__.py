"""Offline: any imbalanced image collection becomes WebDataset shards with a class index."""
