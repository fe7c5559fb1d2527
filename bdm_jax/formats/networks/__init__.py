"""One file per network: the names of its tensors in community files, its sizes by their shapes, how it is recognised.

Each has `KINDS`, what config.json calls it (`_class_name` or `model_type`) and what it is called here; `TABLES`, the
names in a component folder, by the same; and finders, which look for it in a file.
"""
