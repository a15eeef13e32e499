"""The papers' mathematics on plain tensors: batch-first, `mask` True on real tokens, end-of-sentence included."""
