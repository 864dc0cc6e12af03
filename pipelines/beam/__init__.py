"""All that knows Beam: the graph of a build, runners, what each engine must be told and says of failures."""
