"""From answers to records of the store: rows merged, features, parts, the ledger of costs."""
