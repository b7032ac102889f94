"""The stages of compression, one file each, in the order capture, profile, plan, apply; ``compress`` calls them."""
