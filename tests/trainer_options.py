"""Options that make a run of the trainer small, for tests that go through its command line."""

SMALL_CROPS = ["--crop-residues", "16", "--num-clusters", "4", "--num-extra", "8"]
SMALL_MODEL = [
    *("--c-m", "8", "--c-z", "8", "--c-e", "8", "--num-blocks", "1", "--num-heads", "2"),
    *("--c-opm", "4"),
]
