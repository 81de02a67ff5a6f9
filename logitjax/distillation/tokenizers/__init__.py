"""Other tokenizers: alignment of texts, projections between vocabularies, likelihood matching."""
