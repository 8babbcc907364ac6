"""Matrix product with weights in the checkpoint's formats."""
