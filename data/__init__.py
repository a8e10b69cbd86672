"""Samples, prompts, frames and the cache: everything before a model runs."""
