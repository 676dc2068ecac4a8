import lavis  # noqa: F401 - registers us before a module of ours is half imported
