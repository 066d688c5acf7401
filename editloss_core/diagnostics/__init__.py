"""Pictures and tables that show what the losses say, and where."""
