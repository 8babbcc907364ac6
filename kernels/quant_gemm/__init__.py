"""Products of already quantised rows: one weight, or one expert per group of rows."""
