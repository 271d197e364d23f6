"""Text files to batches: manifest, readers, filters, lanes, packing and the stream that training reads."""
