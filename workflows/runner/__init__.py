"""The programs behind workflows/run.py: a ComfyUI server, a client of it, and the way from a saved graph to a prompt."""
