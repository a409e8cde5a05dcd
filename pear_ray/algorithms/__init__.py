"""The pure core: tensors in, tensors out; no Ray, no engines, no files."""
