"""The vLLM engine in this process, weight sync, and collecting scored groups."""
