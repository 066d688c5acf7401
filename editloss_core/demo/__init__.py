"""The embedded default: drawn scenes, a small Kontext-shaped edit model of them, and a judge that knows the truth."""
