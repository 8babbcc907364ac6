"""The boundary between two sub-layers: streams mixed, then collapsed, at once."""
