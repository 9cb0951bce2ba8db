"""The experts' feed-forward networks from rows to rows, and the whole layer from tokens to tokens, forward and backward."""
