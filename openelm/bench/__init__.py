"""What this machine can do at most, and how near to it the framework comes."""
