"""Expert selection and routing weights."""
