"""Search for the compact robust network over width and depth (RC-NAS)."""
