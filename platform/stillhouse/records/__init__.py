"""Frozen records with named, shaped fields: what passes between data, networks and methods."""
