"""Models as folders: saved, loaded, shared, sampled from."""
