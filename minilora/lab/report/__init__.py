"""One self-contained page about a run, or about an adapter over its base."""
