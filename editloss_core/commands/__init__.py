"""The command line: its one tree of programs, what their exit statuses mean, and how they print tables. Needs no torch."""
