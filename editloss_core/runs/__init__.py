"""What a run leaves on disk and everyone may read: log, checkpoints, pictures."""
