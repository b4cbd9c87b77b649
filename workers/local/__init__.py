"""A teacher held on this cluster's own accelerators."""
