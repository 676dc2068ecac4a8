import warnings

with warnings.catch_warnings():  # of LAVIS's dependencies
    warnings.simplefilter("ignore")
    import lavis  # noqa: F401 - registers us before a module of ours is half imported
