"""Whether an edit failed, how and where, judged from pixels and geometry."""
