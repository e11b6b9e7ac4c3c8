"""Single-device networks; they know no ranks."""
