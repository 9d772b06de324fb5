"""The torch-free runtime: open a bundle, embed, rerank, measure."""
