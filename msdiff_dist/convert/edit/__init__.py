"""Models made from models: grown to stages, merged, cut out, changed in width."""
