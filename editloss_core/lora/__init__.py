"""LoRAs of any network, and their names in files."""
