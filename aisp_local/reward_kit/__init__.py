"""Tools for reward folders."""
