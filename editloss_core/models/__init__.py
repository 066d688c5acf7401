"""Edit models: one small file each, found in the registry, and what is shared by all of them."""
