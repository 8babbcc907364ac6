"""All that the compressors of a layer do in a decode step."""
