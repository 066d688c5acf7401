"""The only room that reaches into the internals of ComfyUI: its models, their weights, and its training loop."""
