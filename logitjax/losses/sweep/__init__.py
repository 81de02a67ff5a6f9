"""The sweep over the vocabulary: blocks of logits that a statistic sums up, never held whole."""
