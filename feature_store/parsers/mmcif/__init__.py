"""mmCIF entries: tables, the deposited sequence, atoms in AlphaFold 2's slots."""
