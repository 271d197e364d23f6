"""Files: hashes, atomic replacement, published folders, locks. A reader sees old or new."""
