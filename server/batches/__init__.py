"""Files and batches: what clients leave here, and its lines answered behind everybody else's requests. No HTTP."""
