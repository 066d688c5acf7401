"""Old names of two programs: ``python -m editloss_core.verdict`` and ``python -m editloss_core.run_report``."""
