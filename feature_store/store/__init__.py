"""The store as a whole: versions opened, records found, SQL, sets and splits asked."""
