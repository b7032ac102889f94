"""Graph passes, one file each; imported as ``tdfx.passes``.

Analysis passes read a captured graph and return records; rewrite passes return a new graph module.
"""
