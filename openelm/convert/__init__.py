"""One model, every runtime: foreign layouts in, foreign layouts out; each one name table read both ways."""
