# Programs, which are imported where they are tested.
collect_ignore_glob = ["fuzz*.py"]
