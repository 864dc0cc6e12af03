"""Search databases: as a user names them, known by digest, registered, staged, made from others' files."""
