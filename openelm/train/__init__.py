"""Training: one loop for any batches and objective, with exact resume and a ledger of what happened."""
