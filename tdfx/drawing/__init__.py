"""Pictures of networks: what is shown, where it lies, and the writers of DOT, SVG and PNG."""
