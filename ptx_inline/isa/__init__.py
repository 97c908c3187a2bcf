"""Number formats, fragment maps, instructions and MMA arithmetic as plain NumPy: what the hardware does, without it."""
