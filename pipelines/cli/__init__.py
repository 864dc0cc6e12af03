"""The commands `foldfeed build`, `database`, `ledger` and `bench search`: options in, tables out."""
